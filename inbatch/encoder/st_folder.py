"""The folder layout of sentence-transformers, read and written without importing it.

Every key of its files is honoured, or changes no embedding, or is refused by name. Module names and pooling flags are
written as every release since 2.0 reads them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inbatch.encoder.folder_settings import (
    SIMILARITIES,
    Settings,
    UnsupportedError,
    file_within,
    read_json,
    read_object,
    settings_of,
    short,
    usual_files,
    write_files,
)
from inbatch.encoder.multi_vector import MultiVector
from inbatch.encoder.multi_vector_folder import DENSE, read_expansion, read_modules, read_top

# sentence-transformers' name -> ours
_POOLING = {"mean": "mean", "cls": "cls", "lasttoken": "last", "weightedmean": "weighted_mean"}
# In the order in which sentence-transformers concatenates several.
_FLAGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
_SUPPORTED = "Transformer, Pooling, Normalize"
# The Transformer module's settings are in the first of these files that holds any.
_TRANSFORMER_FILES = [
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]
_TOKEN_STATES = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
# With one of these beside the tokenizer, sentence-transformers opens a processor of several modalities.
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
# Options of a tokenizer that transformers takes when it opens one, and saves with it.
_TOKENIZER_OPTIONS = {
    **dict.fromkeys(("truncation_side", "padding_side"), "'left' or 'right'"),
    **dict.fromkeys(("do_lower_case", "add_prefix_space", "use_fast", "clean_up_tokenization_spaces"), "true or false"),
    **dict.fromkeys(
        ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"), "text"
    ),
    "model_max_length": "a positive integer",
}
# What `processing_kwargs` may say of texts without changing a token.
_USUAL_TOKENS = {
    "padding": (True, "longest"),
    "truncation": (True, "longest_first"),
    "add_special_tokens": (True,),
    "return_tensors": ("pt",),
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Hold the settings of a sentence-transformers folder beside those of its backbone and tokenizer."""

    pooling: str
    l2_normalize: bool
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    similarity: str = "cosine"
    truncate_dim: int | None = None
    max_seq_length: int | None = None
    query_length: int | None = None
    document_length: int | None = None
    do_lower_case: bool = False
    multi_vector: MultiVector | None = None


@dataclass(frozen=True, kw_only=True)
class Folder:
    """An opened folder: where its backbone is, and how to open that."""

    layout: Layout
    home: str = ""
    tokenizer_options: dict[str, Any] = field(default_factory=dict)
    bidirectional: bool = False  # a decoder whose config does not say; sentence-transformers runs it causal
    dense: tuple[str, ...] = ()  # folders of the layers that project token states
    prefixes: dict[str, str] = field(default_factory=dict)  # what PyLate puts in front of a task's texts, as one token


def read_layout(folder: Path) -> Folder | None:
    """Return the settings of `folder`, or None if it has no modules.json.

    Raises UnsupportedError for what only sentence-transformers can do, such as modules of custom code, and ValueError
    for unknown keys and values of a wrong type.
    """
    if not file_within(folder, "modules.json").is_file():
        return None
    top = settings_of(folder, "config_sentence_transformers.json")
    top.ignore("__version__")
    model_type = top.take("model_type", "text")
    if model_type not in (None, "SentenceTransformer", "MultiVectorEncoder", "ColBERT"):
        raise ValueError(f"{folder}: model_type {model_type:.80} is not a bi-encoder")
    kinds, paths = _read_modules(folder)
    if _is_multi_vector(kinds):
        try:
            return _read_multi_vector(folder, kinds, paths, top, native=model_type == "MultiVectorEncoder")
        except UnsupportedError as error:  # sentence-transformers' class for one vector a text would not open it either
            raise ValueError(str(error)) from None
    if model_type not in (None, "SentenceTransformer"):
        raise ValueError(f"{folder}: model_type {model_type:.80} with the modules {kinds!s:.200} is not a bi-encoder")
    prompts = _read_prompts(folder, top)
    similarity = top.take("similarity_fn_name", f"one of {', '.join(SIMILARITIES)}")
    truncate_dim = top.take("truncate_dim", "a positive integer")
    top.done()
    lengths, tokenizer_options, rest = _read_transformer(folder, paths[0])
    rest.require("query_expansion", None)
    rest.done()
    pooling = _read_pooling(folder, Path(paths[1], "config.json"))
    if len(kinds) == 3:
        normalize = settings_of(folder, Path(paths[2], "config.json"))
        normalize.require("module_input_name", "sentence_embedding")
        normalize.require("module_output_name", "sentence_embedding", None)
        normalize.done()
    layout = Layout(
        pooling=pooling,
        l2_normalize=len(kinds) == 3,
        similarity=similarity or "cosine",
        truncate_dim=truncate_dim,
        **prompts,
        **lengths,
    )
    return Folder(layout=layout, home=paths[0], tokenizer_options=tokenizer_options)


def _is_multi_vector(kinds: list[str]) -> bool:
    return "MultiVectorMask" in kinds or (kinds[1:2] == ["Dense"] and "Pooling" not in kinds)


def _read_multi_vector(folder: Path, kinds: list[str], paths: list[str], top: Settings, *, native: bool) -> Folder:
    prompts = _read_prompts(folder, top)
    said = read_top(top, native=native)
    top.require("truncate_dim", None)
    top.done()
    options, dense = read_modules(folder, list(zip(kinds, paths, strict=True))[1:], said.pop("multi_vector"))
    lengths, tokenizer_options, rest = _read_transformer(folder, paths[0])
    options = read_expansion(rest, lengths, options)
    rest.done()
    prefixes = said.pop("prefixes")
    prompts["prompts"] |= {name: prefix + prompts["prompts"].get(name, "") for name, prefix in prefixes.items()}
    usual = {"pooling": "multi_vector", "l2_normalize": True, "similarity": "max_sim"}
    layout = Layout(**usual, multi_vector=options, **prompts, **{**lengths, **said})
    return Folder(
        layout=layout, home=paths[0], tokenizer_options=tokenizer_options, dense=tuple(dense), prefixes=prefixes
    )


def _read_prompts(folder: Path, top: Settings) -> dict[str, Any]:
    """Return the fields of Layout on prompts."""
    top.require("requirements", {}, None)
    prompts = {name: text or "" for name, text in (top.take("prompts", "an object of texts") or {}).items()}
    default_prompt_name = top.take("default_prompt_name", "text")
    if default_prompt_name not in (None, "query", "document", *prompts):
        raise ValueError(
            f"{folder / 'config_sentence_transformers.json'}: default_prompt_name {default_prompt_name!r:.80} is none "
            f"of its prompts {sorted(prompts)!s:.300}"
        )
    return {"prompts": prompts, "default_prompt_name": default_prompt_name}


def _read_modules(folder: Path) -> tuple[list[str], list[str]]:
    """Return the kinds and folders of the modules; ValueError for modules, or an order, that are not supported."""
    path = folder / "modules.json"
    modules = read_json(path)
    if not isinstance(modules, list) or not all(
        isinstance(module, dict) and all(isinstance(module.get(key), str) for key in ("type", "path"))
        for module in modules
    ):
        raise ValueError(f"{path} is not a list of modules: expected objects, each with a type and a path")
    for module in modules:
        if module["path"].startswith("/") or ".." in Path(module["path"]).parts:
            raise ValueError(f"{path}: the path {module['path']!r:.200} leads out of the model's folder")
        file_within(folder, module["path"])
        if not module["type"].startswith("sentence_transformers.") and module["type"] != DENSE:
            raise UnsupportedError(
                f"{folder}: module {module['type']:.200} is custom code, which inbatch does not run itself: expected "
                f"{_SUPPORTED}, of sentence-transformers"
            )
    kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
    several = _is_multi_vector(kinds)
    of_several = ("Transformer", "Dense", "MultiVectorMask", "Normalize", "HierarchicalTokenPooling")
    known = of_several if several else ("Transformer", "Pooling", "Normalize")
    for module, kind in zip(modules, kinds, strict=True):
        if kind not in known:
            where = f" (folder {module['path']!r:.200})" if module["path"] else ""
            raise UnsupportedError(f"{folder}: module {module['type']:.200}{where} is not supported")
        settings = Settings(path, module)
        settings.take("kwargs", "text or a list of texts")  # names of arguments that none of the three has
        settings.ignore("idx", "name", "path", "type")
        settings.done()
    if not several and kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UnsupportedError(
            f"{folder}: modules {kinds!s:.200} (expected {_SUPPORTED}, in this order) are not supported"
        )
    names = [module.get("name") for module in modules]
    if any(names.count(name) > 1 for name in names):
        raise ValueError(f"{path}: two modules have the name {short(names[1])}; give them different names")
    return kinds, [module["path"] for module in modules]


def _read_transformer(folder: Path, home: str) -> tuple[dict[str, Any], dict[str, Any], Settings]:
    """Return fields of Layout, options for the tokenizer, and the rest of the Transformer module's settings."""
    for name in _PROCESSOR_FILES:
        if (folder / home / name).is_file():
            raise UnsupportedError(f"{folder / home / name}: a model of several modalities is not supported")
    for name in ("tokenizer_config.json", "config.json"):
        if (read_object(folder, Path(home, name)) or {}).get("processor_class") is not None:
            raise UnsupportedError(f"{folder / home / name}: a processor_class is not supported")
    files = ((folder / home / name, read_object(folder, Path(home, name))) for name in _TRANSFORMER_FILES)
    path, values = next(((path, values) for path, values in files if values), (folder / home, {}))
    settings = Settings(path, values)
    settings.require("transformer_task", "feature-extraction")
    if "modality_config" in values:
        settings.require("modality_config", _TOKEN_STATES)
        settings.require("module_output_name", "token_embeddings")
    settings.require("tokenizer_name_or_path", None)
    settings.ignore("module_output_name", "unpad_inputs", "backend")
    for key in ("model_kwargs", "model_args", "config_kwargs", "config_args"):
        # That custom code may run is never for the folder to say.
        if any(name != "trust_remote_code" for name in settings.take(key, "an object") or {}):
            raise UnsupportedError(f"{path}: {key} {short(values[key])} is not supported")
    _require_usual_tokens(path, settings.take("processing_kwargs", "an object") or {})
    new, old = (settings.take(key, "an object") for key in ("processor_kwargs", "tokenizer_args"))
    if new and old is not None:
        raise ValueError(f"{path}: processor_kwargs beside tokenizer_args, its older name, has no effect: delete one")
    given = Settings(path, new or old or {}, "processor_kwargs." if new else "tokenizer_args.")
    given.ignore("trust_remote_code")
    tokenizer = {name: given.take(name, kind) for name, kind in _TOKENIZER_OPTIONS.items()}
    given.done()
    tokenizer = {name: value for name, value in tokenizer.items() if value is not None}
    lengths: dict[str, Any] = {
        name: settings.take(name, "a positive integer")
        for name in ("max_seq_length", "query_length", "document_length")
    }
    lengths["max_seq_length"] = tokenizer.pop("model_max_length", None) or lengths["max_seq_length"]
    lengths["do_lower_case"] = bool(settings.take("do_lower_case", "true or false"))
    return {name: length for name, length in lengths.items() if length is not None}, tokenizer, settings


def _require_usual_tokens(path: Path, processing: dict[str, Any]) -> None:
    for modality, options in processing.items():
        if modality in ("image", "audio", "video", "chat_template"):
            continue  # texts never meet them
        if modality not in ("text", "common") or not isinstance(options, dict):
            raise ValueError(
                f"{path}: processing_kwargs.{modality} ({short(options)}) is not known here: delete it there"
            )
        for key, value in options.items():
            if not any(type(value) is type(usual) and value == usual for usual in _USUAL_TOKENS.get(key, ())):
                raise UnsupportedError(f"{path}: processing_kwargs.{modality}.{key} {short(value)} is not supported")


def _read_pooling(folder: Path, name: Path) -> str:
    path, values = folder / name, read_object(folder, name)
    if values is None:
        raise ValueError(f"{path} is missing, which says how the model pools: copy it from the model's source")
    settings = Settings(path, values)
    flags = [mode for mode, flag in _FLAGS.items() if settings.take(flag, "true or false")]
    modes = settings.take("pooling_mode", "text or a list of texts")
    if "pooling_mode" not in values:
        modes = flags or "mean"
    modes = [modes] if isinstance(modes, str) else modes or []
    for key in ("embedding_dimension", "word_embedding_dimension"):
        settings.take(key, "a positive integer")
    settings.take("include_prompt", "true or false")
    settings.done()
    if not modes or not all(mode in _FLAGS for mode in modes):
        raise ValueError(f"{path}: pooling_mode {short(modes)} is unknown; supported: {', '.join(_POOLING)}")
    if len(modes) != 1 or modes[0] not in _POOLING:
        raise UnsupportedError(f"{path}: pooling_mode: pooling {'+'.join(modes)} is not supported")
    if not values.get("include_prompt", True):
        raise UnsupportedError(f"{path}: include_prompt=false (prompt tokens left out of the pooling) is not supported")
    return _POOLING[modes[0]]


def write_layout(folder: Path, layout: Layout, embedding_dim: int) -> None:
    """Write every file of the layout but those of backbone and tokenizer; embedding_dim: of the token states."""
    theirs = next(name for name, ours in _POOLING.items() if ours == layout.pooling)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")] + [("2_Normalize", "Normalize")] * layout.l2_normalize
    files = usual_files(
        layout,
        [(path, f"sentence_transformers.models.{kind}") for path, kind in kinds],
        model_type="SentenceTransformer",
        prompts=layout.prompts,
        similarity=layout.similarity,
    )
    # Releases that do not know these keys refuse the first and ignore the others: only where they say something.
    for name, keys in (
        ("config_sentence_transformers.json", ("truncate_dim",)),
        ("sentence_bert_config.json", ("query_length", "document_length")),
    ):
        files[name] |= {key: value for key in keys if (value := getattr(layout, key)) is not None}
    flags = {flag: mode == theirs for mode, flag in _FLAGS.items()}
    files["1_Pooling/config.json"] = {"word_embedding_dimension": embedding_dim, **flags, "include_prompt": True}
    if layout.l2_normalize:
        files["2_Normalize/config.json"] = {}
    write_files(folder, files)
