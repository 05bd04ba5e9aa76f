"""A model's JSON files. Of those read every key is honoured, or changes no embedding, or is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
_KINDS: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "true or false": lambda value: isinstance(value, bool),
    "a positive integer": lambda value: type(value) is int and value >= 1,
    "an integer of at least 0": lambda value: type(value) is int and value >= 0,
    "an object": lambda value: isinstance(value, dict),
    "an object of texts": lambda value: (
        isinstance(value, dict) and all(isinstance(text, str | None) for text in value.values())
    ),
    "text or a list of texts": lambda value: all(
        isinstance(text, str) for text in (value if isinstance(value, list) else [value])
    ),
    "'left' or 'right'": lambda value: value in ("left", "right"),
    f"one of {', '.join(SIMILARITIES)}": lambda value: value in SIMILARITIES,
}


class UnsupportedError(ValueError):
    """A folder that sentence-transformers opens and BiEncoderModel does not."""


class Settings:
    """The settings of one file, taken one by one; `done` refuses the rest by name."""

    def __init__(self, path: Path, values: dict[str, Any], inner: str = ""):
        self._path, self._where, self._left = path, f"{path}: {inner}", dict(values)

    def take(self, key: str, kind: str) -> Any:
        """Return a value of this kind; None where it is absent or null."""
        value = self._left.pop(key, None)
        if value is not None and not _KINDS[kind](value):
            raise ValueError(f"{self._where}{key} is {short(value)}; expected {kind}")
        return value

    def require(self, key: str, *usual: Any) -> None:
        """Refuse a value other than these; the first is the default."""
        value = self._left.pop(key, usual[0])
        if not any(type(value) is type(allowed) and value == allowed for allowed in usual):
            raise UnsupportedError(f"{self._where}{key} {short(value)} is not supported")

    def ignore(self, *keys: str) -> None:
        """Drop keys that change no embedding."""
        for key in keys:
            self._left.pop(key, None)

    def within(self, inner: str, values: dict[str, Any]) -> "Settings":
        """Return the settings that are an object among these."""
        return Settings(self._path, values, inner)

    def done(self) -> None:
        if self._left:
            key, value = next(iter(self._left.items()))
            raise ValueError(
                f"{self._where}{key} ({short(value)}) is not known here; if it changes no embedding, delete it there"
            )


def short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def file_within(folder: Path, name: str | Path) -> Path:
    """Return the path of `name` in `folder`; ValueError where `..` or a link leads out of the folder."""
    path, root = folder / name, folder.resolve()
    try:
        target = path.resolve()
        path.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder}: there can be no file {str(name)[:80]!r}: {str(error)[:60]}") from None
    # Files in a snapshot of the hub's cache are links to the blobs beside the snapshots.
    if not target.is_relative_to(root) and target.parent != root.parent.parent / "blobs":
        raise ValueError(f"{path} lies outside of the model's folder: copy it into the folder")
    return path


def read_object(folder: Path, name: str | Path) -> dict[str, Any] | None:
    """Return the JSON object in a file of the folder, or None where there is no such file."""
    path = file_within(folder, name)
    if not path.is_file():
        return None
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


def read_json(path: Path) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair could not be saved
        return value
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def settings_of(folder: Path, name: str | Path) -> Settings:
    return Settings(folder / name, read_object(folder, name) or {})


def usual_files(
    layout: Any, modules: list[tuple[str, str]], *, model_type: str, prompts: dict[str, str], similarity: str
) -> dict[str, Any]:
    """Return the JSON files that every folder has, by name. layout: a `Layout`. modules: (folder, type) of each."""
    return {
        "modules.json": [
            {"idx": index, "name": str(index), "path": path, "type": kind} for index, (path, kind) in enumerate(modules)
        ],
        "config_sentence_transformers.json": {
            "__version__": {"transformers": transformers.__version__, "pytorch": torch.__version__},
            "model_type": model_type,
            "prompts": prompts,
            "default_prompt_name": layout.default_prompt_name,
            "similarity_fn_name": similarity,
        },
        "sentence_bert_config.json": {"max_seq_length": layout.max_seq_length, "do_lower_case": layout.do_lower_case},
    }


def write_files(folder: Path, files: dict[str, Any]) -> None:
    """Write JSON files, by their names within the folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
