"""The folder layout of sentence-transformers, read and written without importing it.

Written: modules.json with the module names and the pooling flags that every release since 2.0 reads. Read: those,
and the layout of release 6 (`pooling_mode`, the length limit in the tokenizer's own file).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

# sentence-transformers' name -> ours
_POOLING = {"mean": "mean", "cls": "cls", "lasttoken": "last", "weightedmean": "weighted_mean"}
_FLAGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
_SUPPORTED = "Transformer, Pooling, Normalize"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a sentence-transformers folder says beyond the backbone's own files."""

    pooling: str
    l2_normalize: bool
    backbone_path: str = ""
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    similarity: str = "cosine"
    max_seq_length: int | None = None
    do_lower_case: bool = False
    bidirectional: bool = False  # what a decoder is whose config says nothing: sentence-transformers runs it causal


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None where there is no such file."""
    if not path.is_file():
        return None
    value = _read(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def _read_modules(path: Path) -> list[dict[str, str]]:
    modules = _read(path)
    objects = isinstance(modules, list) and all(isinstance(module, dict) for module in modules)
    if not objects or not all(isinstance(module.get(key), str) for module in modules for key in ("type", "path")):
        raise ValueError(f"{path} is no list of modules: expected objects, each with a type and a path")
    return modules


def read_layout(folder: Path) -> Layout | None:
    """The layout of `folder`, or None when it has no modules.json; ValueError for modules that we do not have."""
    if not (folder / "modules.json").is_file():
        return None
    modules = _read_modules(folder / "modules.json")
    kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
    for kind, module in zip(kinds, modules, strict=True):
        if kind not in ("Transformer", "Pooling", "Normalize"):
            where = f" (folder {module['path']!r})" if module.get("path") else ""
            raise ValueError(f"{folder}: module {module['type']}{where} is not supported; supported: {_SUPPORTED}")
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ValueError(f"{folder}: modules {kinds} are not supported; expected {_SUPPORTED}, in this order")
    backbone = folder / modules[0]["path"]
    transformer = read_object(backbone / "sentence_bert_config.json") or {}
    _check_transformer(folder, transformer)
    processor = transformer.get("processor_kwargs") or transformer.get("tokenizer_args") or {}
    top = read_object(folder / "config_sentence_transformers.json") or {}
    return Layout(
        pooling=_read_pooling(folder / modules[1]["path"] / "config.json"),
        l2_normalize="Normalize" in kinds,
        backbone_path=modules[0]["path"],
        prompts={name: text or "" for name, text in (top.get("prompts") or {}).items()},
        default_prompt_name=top.get("default_prompt_name"),
        similarity=top.get("similarity_fn_name") or "cosine",
        max_seq_length=transformer.get("max_seq_length") or processor.get("model_max_length"),
        do_lower_case=bool(transformer.get("do_lower_case", False)),
    )


def _check_transformer(folder: Path, transformer: dict[str, Any]) -> None:
    """ValueError for settings that would make sentence-transformers compute other states than the plain backbone."""
    task = transformer.get("transformer_task", "feature-extraction")
    text = transformer.get("modality_config", {"text": {}}).get("text")
    if task != "feature-extraction" or text is None or text.get("method", "forward") != "forward":
        raise ValueError(f"{folder}: its Transformer module is no plain text encoder (task {task}, text {text})")
    for key in ("model_kwargs", "model_args", "config_kwargs", "config_args"):
        if transformer.get(key):
            raise ValueError(
                f"{folder}: sentence_bert_config.json sets {key}={transformer[key]}, which is not supported"
            )


def _read_pooling(path: Path) -> str:
    config = read_object(path)
    if config is None:
        raise ValueError(f"{path} is missing, which says how the model pools: copy it from the model's source")
    modes = config.get("pooling_mode") or [mode for mode, flag in _FLAGS.items() if config.get(flag)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in _POOLING:
        raise ValueError(f"{path}: pooling {'+'.join(modes)} is not supported; supported: {', '.join(_POOLING)}")
    if not config.get("include_prompt", True):
        raise ValueError(f"{path}: include_prompt=false (prompt tokens left out of the pooling) is not supported")
    return _POOLING[modes[0]]


def write_layout(folder: Path, layout: Layout, embedding_dim: int) -> None:
    """Write every file of the layout but the backbone's and the tokenizer's own."""
    theirs = next(name for name, ours in _POOLING.items() if ours == layout.pooling)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")] + [("2_Normalize", "Normalize")] * layout.l2_normalize
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(kinds)
    ]
    pooling = {"word_embedding_dimension": embedding_dim}
    pooling |= {flag: mode == theirs for mode, flag in _FLAGS.items()}
    top = {
        "__version__": {"transformers": transformers.__version__, "pytorch": torch.__version__},
        "model_type": "SentenceTransformer",
        "prompts": layout.prompts,
        "default_prompt_name": layout.default_prompt_name,
        "similarity_fn_name": layout.similarity,
    }
    files: dict[str, Any] = {
        "modules.json": modules,
        "1_Pooling/config.json": pooling | {"include_prompt": True},
        "config_sentence_transformers.json": top,
        "sentence_bert_config.json": {
            "max_seq_length": layout.max_seq_length,
            "do_lower_case": layout.do_lower_case,
        },
    }
    if layout.l2_normalize:
        files["2_Normalize/config.json"] = {}
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
