"""Opening a backbone and its tokenizer: where they are, and what their configuration must say.

Shapes: B texts, T token positions, D dimension.
"""

import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from tokenizers import normalizers
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from inbatch.encoder.st_folder import read_object

# transformers marks "no limit" with a huge model_max_length.
_NO_LIMIT = 10**9
_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
_OTHER_RUNTIMES = ["onnx/*", "openvino/*"]
# Decoders that heed config.is_causal = False, each held by a test; any other one is asked, by a forward pass.
BIDIRECTIONAL_DECODERS = ("llama", "ministral3", "qwen3")


def local_folder(name: str) -> Path:
    """The folder itself, or the snapshot of a hub model (downloaded where needed); ValueError where there is none."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / file).is_file() for file in ("config.json", "modules.json", "adapter_config.json")):
            raise ValueError(f"{name} is no model: the folder has neither config.json nor modules.json")
        return folder
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise ValueError(f"{name} is no model: there is no such folder")
    try:
        path = snapshot_download(name, allow_patterns=_FILES, ignore_patterns=_OTHER_RUNTIMES)
        if not any(Path(path).glob("**/*.safetensors")):
            path = snapshot_download(name, allow_patterns=[*_FILES, "*.bin"], ignore_patterns=_OTHER_RUNTIMES)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name!r} is no folder here, and the hub has no such model for us: {reason}") from error
    return Path(path)


def load_backbone(folder: Path, dtype: str | torch.dtype | None, attn_implementation: str | None) -> PreTrainedModel:
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds a LoRA adapter (adapter_config.json): merge it into its base model first")
    read_object(folder / "config.json")
    options = {"dtype": dtype, "attn_implementation": attn_implementation}
    options = {key: value for key, value in options.items() if value is not None}
    try:
        backbone, report = AutoModel.from_pretrained(folder, output_loading_info=True, **options)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be opened as a transformers model: {error}") from error
    if backbone.config.is_encoder_decoder:
        raise ValueError(f"{folder}: {backbone.config.model_type} is an encoder-decoder; use an encoder or a decoder")
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        # transformers would go on with random numbers in their place.
        raise ValueError(f"{folder}: {len(missing)} weights of {type(backbone).__name__} are missing: {missing[:3]}...")
    return backbone


def load_tokenizer(folder: Path, lower_case: bool) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers checks no tokenizer.json: a wrong one raises whatever it runs into
        reason = str(error) if isinstance(error, (OSError, ValueError, ImportError)) else repr(error)
        raise ValueError(f"{folder}: its tokenizer cannot be opened: {reason}") from error
    _require_vocabulary(folder, tokenizer)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"{folder}: the tokenizer has neither a pad token nor an eos token to pad with")
        # Recorded in the tokenizer's files only: a pad_token_id in config.json would make transformers freeze the
        # embedding of the eos token, which last-token pooling trains.
        tokenizer.pad_token = tokenizer.eos_token
    if lower_case:
        backend = tokenizer.backend_tokenizer
        if backend.normalizer is None:
            backend.normalizer = normalizers.Lowercase()
        elif backend.normalizer.normalize_str("A") != "a":
            backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), backend.normalizer])
    return tokenizer


def _require_vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError where transformers made up an empty vocabulary, to which a text is nothing but unknown tokens."""
    # Merges or settings alone hold no tokens. Tokenizers of bytes or characters need no file.
    other = ("merges_file", "normalizer_file", "tokenizer_config_file")
    names = sorted(name for kind, name in tokenizer.vocab_files_names.items() if kind not in other)
    # Under these names transformers finds a vocabulary too, whatever the class of the tokenizer.
    anywhere = [*folder.glob("*.model"), *folder.glob("*tekken*.json"), *folder.glob("tokenizer.*.json")]
    if names and not anywhere and not any((folder / name).is_file() for name in names):
        raise ValueError(
            f"{folder} has no vocabulary for its tokenizer ({type(tokenizer).__name__}): expected one of the files "
            f"{', '.join(names)}; copy the tokenizer's files there from the model it was trained from"
        )


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
    """Whether its attention looks back only, unless told otherwise."""
    if any(getattr(module, "is_causal", False) is True for module in backbone.modules()):
        return True
    # Some decoders do not say so in their modules; they are the ones without a masked-language model.
    kind = backbone.config.model_type
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


@torch.no_grad()
def _require_bidirectional(backbone: PreTrainedModel) -> None:
    """ValueError unless the first token's state feels the last token."""
    ids_BT = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 2]], device=backbone.device)
    states_BTD = backbone(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).last_hidden_state
    if torch.equal(states_BTD[0, 0], states_BTD[1, 0]):
        raise ValueError(
            f"{backbone.config.model_type} cannot be made bidirectional: transformers ignores is_causal=False for it; "
            "pass bidirectional=False to use its causal attention"
        )


def position_table(backbone: PreTrainedModel) -> tuple[int | None, int]:
    """(positions that a learned table offers, number of its first one); (None, 0) without such a table."""
    for module in backbone.modules():
        table = getattr(module, "position_embeddings", getattr(module, "wpe", None))
        if isinstance(table, nn.Embedding):
            # RoBERTa and its kin count from padding_idx + 1.
            padding = getattr(module, "padding_idx", None)
            offset = padding + 1 if isinstance(padding, int) else 0
            return table.num_embeddings - offset, offset
    return None, 0


def length_limit(saved: int | None, tokenizer: PreTrainedTokenizerBase, backbone: PreTrainedModel) -> int | None:
    """The tokens that a text is cut to: what was saved, else the least that tokenizer and config state; it must fit."""
    stated = [saved] if saved else [tokenizer.model_max_length, getattr(backbone.config, "max_position_embeddings", 0)]
    limits = [*stated, position_table(backbone)[0]]
    return min((limit for limit in limits if limit and 0 < limit < _NO_LIMIT), default=None)
