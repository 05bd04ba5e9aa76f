"""Checkpoints: folders that are either whole or absent.

A checkpoint is `step-00000100/`, written by all ranks through torch.distributed.checkpoint: the trainable parameters,
the optimizer's state and the step. It is read back on any number of ranks, sharded or not; `inbatch export` makes a
model of it. Nothing random is saved: batches and dropout are functions of (seed, step, rank).
"""

import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from inbatch import collectives
from inbatch.data.files import partial, publish, remove

_STEP_FOLDER = re.compile(r"step-(\d{8})")
# Names in a checkpoint follow the modules, not the order of the parameters or where they lie; what is frozen is read
# from where it came.
_OPTIONS = StateDictOptions(ignore_frozen_params=True, flatten_optimizer_state_dict=True, strict=False)


def save(
    folder: str | Path,
    step: int,
    *,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    keep_last: int,
) -> Path:
    """Writes the checkpoint of `step` (optimizer steps done) into `folder`, deletes all but the newest `keep_last`.

    Every rank calls it and writes a part: `folder` is on a file system that they share. modules: by name, as they are
    (DDP may hold them); the optimizer's parameters are theirs.
    """
    path = Path(folder) / f"step-{step:08d}"
    first = collectives.rank() == 0

    def begin() -> None:
        remove(partial(path))
        partial(path).mkdir(parents=True)

    collectives.together(lambda: begin() if first else None)
    root = nn.ModuleDict(modules)
    state = {
        "model": get_model_state_dict(root, options=_OPTIONS),
        "optimizer": get_optimizer_state_dict(root, optimizer, options=_OPTIONS),
        "step": step,
    }
    with _plain_errors(f"the checkpoint {path} cannot be written"):
        state_dict_saver.save(state, checkpoint_id=partial(path), no_dist=collectives.world_size() == 1)

    def finish() -> None:
        publish(path)
        for _, old in list_checkpoints(folder)[:-keep_last]:
            remove(old)

    collectives.together(lambda: finish() if first else None)
    return path


def load(path: str | Path, *, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer | None = None) -> int:
    """Loads a checkpoint into the same modules on any number of ranks; returns the number of steps done.

    Frozen parameters are left as they are. Raises ValueError, on every rank, for a checkpoint of other modules.
    """
    path = Path(path)
    root = nn.ModuleDict(modules)
    state: dict[str, Any] = {"model": get_model_state_dict(root, options=_OPTIONS), "step": 0}
    collectives.together(lambda: _check_fits(path, state["model"]))
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(root, optimizer, options=_OPTIONS)
    # A parameter that no batch has used yet has no moments in the checkpoint: it keeps its zeros.
    planner = DefaultLoadPlanner(allow_partial_load=True)
    with _plain_errors(f"the checkpoint {path} cannot be read"):
        state_dict_loader.load(state, checkpoint_id=path, planner=planner, no_dist=collectives.world_size() == 1)
    if optimizer is not None:
        set_optimizer_state_dict(root, optimizer, state["optimizer"], options=_OPTIONS)
    return state["step"]


def _check_fits(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    if not (path / ".metadata").is_file():
        raise ValueError(f"{path} is no checkpoint: it has no .metadata")
    try:
        known = FileSystemReader(path).read_metadata().state_dict_metadata
    except (EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is no whole checkpoint: its .metadata cannot be read ({error})") from None
    for key, tensor in state.items():
        size = getattr(known.get(f"model.{key}"), "size", None)
        if size != tensor.shape:
            given = "absent" if size is None else tuple(size)
            raise ValueError(f"{path} is of another model: {key} is {given}, expected {tuple(tensor.shape)}")


@contextmanager
def _plain_errors(what: str) -> Iterator[None]:
    """What torch.distributed.checkpoint raises is no Exception; and it warns of running in one process, as asked."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        try:
            yield
        except CheckpointException as error:
            rank, failure = next(iter(error.failures.items()))
            reason = failure[0] if isinstance(failure, tuple) else failure
            if "DataLoader worker" in str(reason):  # a signal that arrived here, and is not of the files
                raise reason from error
            raise OSError(f"{what}, rank {rank}: {str(reason) or type(reason).__name__}") from error


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
