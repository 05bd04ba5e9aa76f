"""Folders that are either whole or absent, and the checkpoints made of them.

A checkpoint is `step-00000100/` with `model/` (which sentence-transformers opens too) and `training.pt`. Nothing
random is saved: batches and dropout are functions of (seed, step, rank).
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

_STEP_FOLDER = re.compile(r"step-(\d{8})")


def write_folder(path: str | Path, fill: Callable[[Path], None]) -> None:
    """Calls fill(temporary folder), forces it to disk, then names it: a crash leaves the old folder or the new.

    What is left of an interrupted write is a hidden `.NAME.partial`, which the next write of that name replaces.
    """
    path = Path(path)
    partial = path.parent / f".{path.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    for file in sorted(partial.rglob("*")):
        _sync(file)
    _sync(partial)
    if path.exists():
        # A folder cannot be replaced in one move: set the old one aside for the moment between the two.
        aside = path.parent / f".{path.name}.old"
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        partial.rename(path)
        shutil.rmtree(aside)
    else:
        partial.rename(path)
    _sync(path.parent)


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Replaces a small JSON file as a whole."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_text(path: str | Path, text: str) -> None:
    """Replaces a text file as a whole: a crash leaves the old text or the new."""
    path = Path(path)
    partial = path.parent / f".{path.name}.partial"
    partial.write_text(text, encoding="utf-8")
    _sync(partial)
    partial.rename(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(
    folder: str | Path,
    step: int,
    *,
    save_model: Callable[[str], None],
    state: Mapping[str, Any],
    keep_last: int,
) -> Path:
    """Writes the checkpoint of `step` (optimizer steps done) into `folder`, deletes all but the newest `keep_last`."""

    def fill(partial: Path) -> None:
        save_model(str(partial / "model"))
        torch.save({**state, "step": step}, partial / "training.pt")

    path = Path(folder) / f"step-{step:08d}"
    write_folder(path, fill)
    for _, old in list_checkpoints(folder)[:-keep_last]:
        shutil.rmtree(old)
    return path


def list_checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """(step, path) of the whole checkpoints, oldest first; partial ones and other files are not seen."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    found = [(_STEP_FOLDER.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match.group(1)), path) for match, path in found if match)


def latest(folder: str | Path) -> tuple[int, Path] | None:
    """The newest whole checkpoint, or None."""
    found = list_checkpoints(folder)
    return found[-1] if found else None


def load_state(path: str | Path) -> dict[str, Any]:
    """What `save` was given as `state`, with "step", on the CPU. Only tensors and plain values are unpickled."""
    return torch.load(Path(path) / "training.pt", map_location="cpu", weights_only=True)
