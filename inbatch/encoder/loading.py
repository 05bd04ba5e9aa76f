"""Open a backbone and its tokenizer, and check that they fit their configuration and each other.

Shapes: B texts, T token positions, D dimension.
"""

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from tokenizers import normalizers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from inbatch.encoder.folder_settings import UnsupportedError, read_object

# transformers marks "no limit" with a huge model_max_length.
NO_LIMIT = 10**9
_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
_OTHER_RUNTIMES = ["onnx/*", "openvino/*"]
# Words, signs and letters that most vocabularies lack.
_PROBE = "The 1st text, \u00fcn\u00efc\u00f6de: \u4e16\u754c \U0001f600."
# Decoders that heed config.is_causal = False, as tests show; others are tried by a forward pass.
BIDIRECTIONAL_DECODERS = ("llama", "ministral3", "qwen3")


def local_folder(name: str) -> Path:
    """Return the folder itself, or the snapshot of a hub model, downloaded if needed; ValueError if there is none."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / file).is_file() for file in ("config.json", "modules.json", "adapter_config.json")):
            if within := sorted(str(file.parent) for file in folder.glob("*/modules.json")):
                raise ValueError(f"{name} is not a model, but holds {' and '.join(within)}: name one of them")
            raise ValueError(f"{name} is not a model: the folder has neither config.json nor modules.json")
        return folder
    if not is_hub_name(name):
        raise ValueError(f"{name} is not a model: there is no such folder")
    try:
        path = snapshot_download(name, allow_patterns=_FILES, ignore_patterns=_OTHER_RUNTIMES)
        if not any(Path(path).glob("**/*.safetensors")):
            path = snapshot_download(name, allow_patterns=[*_FILES, "*.bin"], ignore_patterns=_OTHER_RUNTIMES)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].removeprefix("Got: ")
        raise ValueError(f"{name!r} is not a folder here, and cannot be had from the hub: {reason}") from error
    return Path(path)


def is_hub_name(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None


def load_backbone(
    folder: Path,
    home: str,
    dtype: str | torch.dtype | None,
    attn_implementation: str | None,
    *,
    trust_remote_code: bool = False,
    whole: bool = False,
) -> PreTrainedModel:
    """Open the backbone in folder / home; for faults ValueError in one line, before anything large is built.

    whole: leave out an adapter that lies beside it.
    """
    place = folder / home
    if not whole and (adapter := read_object(folder, Path(home, "adapter_config.json"))) is not None:
        return _with_adapter(place, adapter, dtype, attn_implementation, trust_remote_code=trust_remote_code)
    values = read_object(folder, Path(home, "config.json")) or {}
    if not trust_remote_code:
        _refuse_custom_code(place / "config.json", values, known=str(values.get("model_type")) in CONFIG_MAPPING)
        settings = read_object(folder, Path(home, "tokenizer_config.json")) or {}
        _refuse_custom_code(place / "tokenizer_config.json", settings, known=True)
    options = {"dtype": dtype, "attn_implementation": attn_implementation}
    options = {key: value for key, value in options.items() if value is not None}
    with failing_as(f"{place} cannot be opened as a transformers model"):
        tensors, size = _weights_of(place)
        _require_countable(values, tensors)
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
        if not trust_remote_code:
            _require_weights_for(config, size)
        backbone, report = AutoModel.from_pretrained(
            place, config=config, output_loading_info=True, trust_remote_code=trust_remote_code, **options
        )
    config = backbone.config
    # The encoder alone may have been saved, whose config says it is none.
    both = config.is_encoder_decoder or (hasattr(backbone, "encoder") and hasattr(backbone, "decoder"))
    if both or config.get_text_config() is not config:
        kind = "an encoder-decoder" if both else "a model of several modalities"
        raise UnsupportedError(f"{place}: {config.model_type} is {kind}, which is not supported")
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        # transformers would go on with random numbers in their place.
        raise ValueError(f"{place}: {len(missing)} weights of {type(backbone).__name__} are missing: {missing[:3]}...")
    return backbone


def _with_adapter(
    place: Path, adapter: dict[str, Any], dtype: str | torch.dtype | None, attn: str | None, *, trust_remote_code: bool
) -> PreTrainedModel:
    """Open the base model that an adapter names, with the adapter merged into its weights."""
    try:
        from peft import PeftConfig, PeftModel
    except ImportError:
        raise ValueError(f"{place} holds an adapter, which peft opens: install inbatch[peft]") from None
    base = adapter.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{place / 'adapter_config.json'} names no base_model_name_or_path: put its base model there")
    if not any((place / f"adapter_model.{ending}").is_file() for ending in ("safetensors", "bin")):
        raise ValueError(f"{place} has no adapter_model.safetensors beside its adapter_config.json: copy it there")
    with failing_as(f"{place}: the base model of its adapter cannot be opened"):
        below = local_folder(base)
        whole = below.resolve() == place.resolve()
        backbone = load_backbone(below, "", dtype, attn, trust_remote_code=trust_remote_code, whole=whole)
    with failing_as(f"{place}: its adapter does not fit {base}"), warnings.catch_warnings():
        # peft would go on with random numbers in their place.
        warnings.filterwarnings("error", "Found missing adapter keys")
        config = PeftConfig.from_pretrained(str(place))
        if config.is_prompt_learning:
            raise ValueError(f"peft_type {adapter.get('peft_type')!r:.60} cannot be merged into the weights")
        # Trained with a head on top, its keys have one name more, and peft asks for that head.
        config.task_type = None
        head = {f"^{re.escape(backbone.base_model_prefix)}\\.": ""}
        adapted: Any = PeftModel.from_pretrained(backbone, str(place), config=config, key_mapping=head)
        return adapted.merge_and_unload().requires_grad_(True)  # peft freezes what an adapter is put on


@contextmanager
def failing_as(what: str) -> Iterator[None]:
    """Let whatever is raised inside end as a ValueError in one line that begins with `what`.

    A wrong file raises whatever a library runs into; a panic in Rust is not even an Exception.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        text = " ".join(str(error).split())
        text = text if len(text) <= 300 else f"{text[:297]}..."
        clear = isinstance(error, (OSError, ValueError, ImportError, RuntimeError))
        raise ValueError(f"{what}: {text if clear else f'{type(error).__name__}: {text}'}") from error


def _refuse_custom_code(path: Path, values: dict[str, Any], *, known: bool) -> None:
    """Name custom code that is not run: by an error, or by a warning if transformers has a class of that name."""
    auto_map = values.get("auto_map", {})
    if not isinstance(auto_map, dict):
        raise ValueError(f"{path}: auto_map is {auto_map!r:.80}; expected an object")
    if not auto_map:
        return
    what = f"{path} names custom code ({json.dumps(auto_map):.120}), which is not run"
    if not known:
        raise ValueError(f"{what}: read it, and pass trust_remote_code=True (model.trust_remote_code) if you trust it")
    warnings.warn(f"{what}: transformers' own class takes its place", stacklevel=4)


def _weights_of(place: Path) -> tuple[int | None, int]:
    """Return (number of tensors, or None where they are not in safetensors; bytes) of the weights in a folder."""
    files = sorted(place.glob("*.safetensors"))
    tensors = 0
    for file in files:
        with safe_open(file, "pt") as weights:
            tensors += len(weights.keys())
    return tensors if files else None, sum(file.stat().st_size for file in files or place.glob("*.bin"))


def _require_countable(values: dict[str, Any], tensors: int | None) -> None:
    """Raise ValueError if transformers would loop over more layers, experts or labels than the weights can hold."""
    limit = 4096 if tensors is None else max(512, tensors)
    for key, value in _numbers(values):
        if re.search(r"(layers?|blocks|experts|labels|stages)$", key) and value > limit:
            raise ValueError(f"config.json: {key} is {value}, more than its weights can hold")


def _numbers(values: dict[str, Any]) -> Iterator[tuple[str, int | float]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, (int, float)):
            yield key, value


def _require_weights_for(config: PretrainedConfig, size: int) -> None:
    """Raise ValueError if the model in config.json is far larger than the `size` bytes of weights beside it."""
    with torch.device("meta"):
        model = AutoModel.from_config(deepcopy(config), trust_remote_code=False)
    described = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if described > 2 * size + 2**24:  # two numbers a byte are the densest quantisation
        raise ValueError(
            f"config.json describes {described:.3g} numbers, its weights hold {size:.3g} bytes: one is wrong"
        )


def load_tokenizer(
    folder: Path, options: Mapping[str, Any] | None = None, *, lower_case: bool, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Open the tokenizer with these options; lower_case puts a Lowercase in front, which is saved with it."""
    missing = "" if any(folder.glob("tokenizer*")) else " (no tokenizer.json: copy its files from the base model)"
    with failing_as(f"{folder}: its tokenizer cannot be opened{missing}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **(options or {}))
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"{folder}: the tokenizer has neither a pad token nor an eos token to pad with")
        # Recorded in the tokenizer's files only: a pad_token_id in config.json would make transformers freeze the
        # embedding of the eos token, which last-token pooling trains.
        tokenizer.pad_token = tokenizer.eos_token
    if lower_case:
        _lower_case(folder, tokenizer)
    return tokenizer


def cut_of(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, Any]:
    """Return the padding and truncation that tokenizer.json would be saved with; each tokenization changes them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return (None, None) if backend is None else (backend.padding, backend.truncation)


def restore_cut(tokenizer: PreTrainedTokenizerBase, cut: tuple[Any, Any]) -> None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        padding, truncation = cut
        backend.enable_padding(**padding) if padding else backend.no_padding()
        backend.enable_truncation(**truncation) if truncation else backend.no_truncation()


def _lower_case(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"{folder}: do_lower_case needs a tokenizer of the tokenizers library: save it as tokenizer.json"
        )
    normalizer = backend.normalizer
    sequence: Any = normalizer if isinstance(normalizer, normalizers.Sequence) else [normalizer] if normalizer else []
    parts = list(sequence)
    if not any(isinstance(part, normalizers.Lowercase) for part in parts):
        lower = normalizers.Lowercase()
        backend.normalizer = normalizers.Sequence([lower, *parts]) if parts else lower


def set_attention(backbone: PreTrainedModel, bidirectional: bool | None, default: bool) -> None:
    """Make a decoder bidirectional or causal through config.is_causal, which transformers heeds and saves.

    Masks are built from that field, and every attention call gets it too, whichever implementation it uses.
    None is what config.json says, else `default`.
    """
    config = backbone.config
    if not _is_decoder(backbone):
        if bidirectional is False:
            raise ValueError(f"bidirectional=False: {config.model_type} is an encoder, its attention is bidirectional")
        return
    causal = getattr(config, "is_causal", None)
    if bidirectional is None:
        bidirectional = default if causal is None else not causal
    if bidirectional:
        config.is_causal = False
        if config.model_type not in BIDIRECTIONAL_DECODERS:
            _require_bidirectional(backbone)
    elif causal is False:
        config.is_causal = True


def _is_decoder(backbone: PreTrainedModel) -> bool:
    """Return True if its attention looks back only by default."""
    if getattr(backbone.config, "use_bidirectional_attention", None) is True:  # EmbeddingGemma's
        return False
    if any(getattr(module, "is_causal", False) is True for module in backbone.modules()):
        return True
    # The modules of some decoders do not say so; those have no masked-language model.
    kind = backbone.config.model_type
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


@torch.no_grad()
def _require_bidirectional(backbone: PreTrainedModel) -> None:
    """Raise ValueError unless the first token's state depends on the last token."""
    ids_BT = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 2]], device=backbone.device)
    states_BTD = backbone(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).last_hidden_state
    if torch.equal(states_BTD[0, 0], states_BTD[1, 0]):
        raise ValueError(
            f"{backbone.config.model_type} cannot be made bidirectional: transformers ignores is_causal=False for it; "
            "pass bidirectional=False to use its causal attention"
        )


def position_table(backbone: PreTrainedModel) -> tuple[int | None, int]:
    """Return (number of positions in a learned table, number of the first); (None, 0) without such a table."""
    for module in backbone.modules():
        table = getattr(module, "position_embeddings", getattr(module, "wpe", None))
        if isinstance(table, nn.Embedding):
            # RoBERTa and its kin count from padding_idx + 1.
            padding = getattr(module, "padding_idx", None)
            offset = padding + 1 if isinstance(padding, int) else 0
            return table.num_embeddings - offset, offset
    return None, 0


def require_fit(
    place: Path, tokenizer: PreTrainedTokenizerBase, backbone: PreTrainedModel, pooling: str | None
) -> None:
    """Raise ValueError for a tokenizer that has no vocabulary, or whose ids, types, limit or padding do not fit.

    pooling: of a folder of sentence-transformers, which counts padding on the left; None for another folder.
    """
    # Merges or settings alone hold no tokens. Tokenizers of bytes or characters need no file.
    other = ("merges_file", "normalizer_file", "tokenizer_config_file")
    files = sorted(name for kind, name in tokenizer.vocab_files_names.items() if kind not in other)
    # Under these names transformers finds a vocabulary too, whatever the class of the tokenizer.
    found = any(any(place.glob(name)) for name in (*files, "*.model", "*tekken*.json", "tokenizer.*.json"))
    if files and not found:  # transformers made up an empty one, to which every token is unknown
        raise ValueError(
            f"{place} has no vocabulary for its tokenizer ({type(tokenizer).__name__}): expected one of the files "
            f"{', '.join(files)}; copy the tokenizer's files there from the model it was trained from"
        )
    if pooling is not None and (what := padding_shifts(tokenizer, backbone, pooling)):
        raise ValueError(
            f"{place}: padding_side left shifts the {what} of shorter texts, so that their embeddings depend on the "
            "longer ones; set it to right in tokenizer_config.json"
        )
    limit = tokenizer.model_max_length
    if type(limit) not in (int, float) or limit < 1 or (limit < NO_LIMIT and type(limit) is float):
        raise ValueError(f"{place}: the tokenizer's model_max_length is {limit!r:.60}; expected a positive integer")
    if "attention_mask" not in tokenizer.model_input_names:
        raise ValueError(
            f"{place}: the tokenizer's model_input_names {tokenizer.model_input_names} lack attention_mask: padding "
            "would count as text; add it in tokenizer_config.json"
        )
    with failing_as(f"{place}: its tokenizer takes no text"):
        cut = cut_of(tokenizer)
        tokens = tokenizer([_PROBE, ""], padding=True)
        restore_cut(tokenizer, cut)
        names = {id: token for token, id in tokenizer.get_vocab().items()}
    try:
        rows: int = backbone.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    except (AttributeError, NotImplementedError):  # it hashes characters, say
        return
    ids: Any = tokens["input_ids"]
    pad: Any = tokenizer.pad_token_id
    largest = max(*names, *ids[0], *ids[1], pad)
    if largest >= rows:
        raise ValueError(
            f"{place}: the tokenizer's largest id is {largest} ({names.get(largest, 'of no token')!r:.60}), but the "
            f"backbone embeds {rows} ids: take the tokenizer that it was trained with, or resize its embeddings"
        )
    if any(any(types) for types in tokens.get("token_type_ids", [])):
        raise UnsupportedError(f"{place}: a tokenizer that gives texts a token type other than 0 is not supported")


def padding_shifts(tokenizer: PreTrainedTokenizerBase, backbone: PreTrainedModel, pooling: str) -> str | None:
    """Return what padding on the left shifts in sentence-transformers, which counts padding; None for nothing."""
    if tokenizer.padding_side != "left":
        return None
    if pooling == "weighted_mean":
        return "weights"
    scaled = "llama_4_scaling_beta" in (getattr(backbone.config, "rope_parameters", None) or {})
    return "positions" if scaled or position_table(backbone)[0] else None


def length_limit(
    place: Path, saved: int | None, tokenizer: PreTrainedTokenizerBase, backbone: PreTrainedModel
) -> int | None:
    """Return the tokens that a text is cut to: the saved limit, else the least of tokenizer and config."""
    positions = position_table(backbone)[0]
    if saved is not None:
        if positions is None or saved <= positions:
            return saved
        warnings.warn(
            f"{place}: texts are cut to the backbone's {positions} positions, not to max_seq_length {saved}",
            stacklevel=3,
        )
    limits = [tokenizer.model_max_length, getattr(backbone.config, "max_position_embeddings", 0), positions]
    return min((limit for limit in limits if limit and 0 < limit < NO_LIMIT), default=None)
