"""Checkpoints: folders that are either whole or absent, whose every byte is checked before it is used.

A checkpoint is `step-00000100/`:

    rank-0.safetensors ...   what each rank wrote: whole tensors, or its rows of sharded ones
    index.json               the step, and for each tensor its shape and the files that hold its rows
    SHA256SUMS               as `sha256sum -c` reads it

It holds the trainable parameters and the optimizer's state; any number of ranks reads it, sharded or not, and reading
runs no code. `inbatch export` makes a model of it. Nothing random is saved: batches and dropout are functions of
(seed, step, rank).
"""

import errno
import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from inbatch import collectives
from inbatch.collectives import on_rank_0
from inbatch.data.files import naming, partial, publish, remove, sync

_STEP_FOLDER = re.compile(r"step-(\d{8})")
_SUMS, _INDEX = "SHA256SUMS", "index.json"
_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16",
           torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}  # fmt: skip


_Count = Annotated[int, Field(ge=0)]


class _Tensor(BaseModel):
    """Hold the index entry of a tensor: its shape, and (file, first row, rows) of its parts."""

    shape: list[_Count]
    parts: list[tuple[Annotated[str, Field(pattern=r"^rank-[0-9]+\.safetensors$")], _Count, _Count]]


class _Index(BaseModel):
    step: _Count
    tensors: dict[str, _Tensor]


@dataclass(frozen=True)
class _Local:
    """Hold this rank's part of a tensor: all of it, or the rows from `start` on."""

    tensor: Tensor
    shape: tuple[int, ...]  # of the whole
    start: int
    sharded: bool


def _local(tensor: Tensor) -> _Local:
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return _Local(tensor, tuple(tensor.shape), 0, sharded=False)
    assert tensor.placements == (Shard(0),), f"expected FSDP2's shards of rows, got {tensor.placements}"
    rows_per_rank = -(-tensor.shape[0] // collectives.world_size())
    start = min(tensor.shape[0], rows_per_rank * collectives.rank())
    return _Local(tensor.to_local(), tuple(tensor.shape), start, sharded=True)


def _weights(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the trainable parameters and the buffers by name; what is frozen is read from where it came."""
    root = nn.ModuleDict(modules)
    frozen = {name for name, p in root.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: value for name, value in root.state_dict(keep_vars=True).items() if name not in frozen}


def _moments(weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state by name: "optimizer/NAME/exp_avg" and the like."""
    return {
        f"optimizer/{name}/{key}": value
        for name, weight in weights.items()
        for key, value in optimizer.state.get(weight, {}).items()
    }


# ---- writing


def save(
    folder: str | Path,
    step: int,
    *,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    keep_last: int,
    keep: int | None = None,
) -> "Saving":
    """Copy the state after `step` optimizer steps to host memory and begin to write it into `folder`.

    Every rank calls it and writes a part: `folder` is on a file system that they share. modules: by name, without DDP
    around them; the optimizer's parameters are theirs. `Saving.finish` gives the checkpoint its name; then all but the
    `keep_last` newest and that of step `keep` are deleted, and so are those of later steps, which are damaged or belong
    to a run that was taken up again before them.
    """
    path = Path(folder) / f"step-{step:08d}"
    weights = _weights(modules)
    tensors = {name: _local(value) for name, value in {**weights, **_moments(weights, optimizer)}.items()}
    mine = _share(tensors)

    def begin() -> None:
        remove(partial(path))
        partial(path).mkdir(parents=True)

    on_rank_0(begin)
    return Saving(path, step, mine, keep_last=keep_last, keep=keep)


class Saving:
    """Write a checkpoint, by a thread of each rank, while training goes on."""

    def __init__(self, path: Path, step: int, tensors: Mapping[str, _Local], *, keep_last: int, keep: int | None):
        self._path, self._step, self._keep_last, self._keep = path, step, keep_last, keep
        self._file = file = f"rank-{collectives.rank()}.safetensors"
        self._parts = {
            name: (local.shape, file, local.start, len(local.tensor) if local.shape else 1)
            for name, local in tensors.items()
        }
        copies = {name: replace(local, tensor=_host_copy(local.tensor)) for name, local in tensors.items()}
        copied = None
        if torch.cuda.is_initialized():
            copied = torch.cuda.Event()
            copied.record()
        writer = ThreadPoolExecutor(1)
        self._digest = writer.submit(_write, partial(path) / file, copies, copied)
        writer.shutdown(wait=False)

    def is_written(self) -> bool:
        """Return whether this rank's part is on disk, or has failed."""
        return self._digest.done()

    def finish(self) -> Path:
        """Wait until every rank's part is on disk, give the checkpoint its name and return it; every rank calls it.

        A failed write is raised on every rank.
        """
        try:
            digest = collectives.together(self._digest.result)
        except Exception:  # such as a full disk, which it would keep full
            remove(partial(self._path))
            raise
        reports = collectives.gather_objects((self._file, digest, self._parts))
        on_rank_0(lambda: self._publish(reports))
        return self._path

    def _publish(self, reports: Sequence[tuple[str, str, Mapping[str, tuple]]]) -> None:
        filled, folder = partial(self._path), self._path.parent
        index: dict[str, Any] = {"step": self._step, "tensors": {}}
        for _, _, parts in reports:
            for name, (shape, *part) in parts.items():
                index["tensors"].setdefault(name, {"shape": shape, "parts": []})["parts"].append(part)
        text = json.dumps(index)
        (filled / _INDEX).write_text(text)
        sums = {file: digest for file, digest, _ in reports} | {_INDEX: hashlib.sha256(text.encode()).hexdigest()}
        (filled / _SUMS).write_text(_sums_text(sums))
        publish(self._path)
        kept = [self._keep, *[s for s, _ in list_checkpoints(folder) if s <= self._step][-self._keep_last :]]
        for s, old in list_checkpoints(folder):
            if s not in kept:
                remove(old)


def sweep(folder: str | Path) -> None:
    """Remove the remains of checkpoints that a killed process was writing or removing; rank 0 calls it."""
    for left in Path(folder).glob(".step-*"):
        remove(left)


def _share(tensors: Mapping[str, _Local]) -> dict[str, _Local]:
    """Return the tensors that this rank writes: its rows of sharded ones, and its share by bytes of the others."""
    total = sum(local.tensor.nbytes for local in tensors.values() if not local.sharded)
    mine, before = {}, 0
    for name, local in tensors.items():
        if local.sharded:
            mine[name] = local
            continue
        if before * collectives.world_size() // max(1, total) == collectives.rank():
            mine[name] = local
        before += local.tensor.nbytes
    return {name: local for name, local in mine.items() if local.tensor.numel()}


def _host_copy(tensor: Tensor) -> Tensor:
    """Return a copy in host memory, which later steps do not change; one from a GPU is ready when its stream is."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda).copy_(tensor, non_blocking=True)


def _write(path: Path, tensors: Mapping[str, _Local], copied: torch.cuda.Event | None) -> str:
    """Write a safetensors file, a tensor at a time, force it to disk and return its SHA-256."""
    if copied is not None:
        copied.synchronize()
    header, stop = {}, 0
    for name, local in tensors.items():
        start, stop = stop, stop + local.tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[local.tensor.dtype],
            "shape": local.tensor.shape,
            "data_offsets": [start, stop],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with naming(path), path.open("wb") as file:

        def put(block: Any) -> None:
            file.write(block)
            digest.update(block)

        put(len(text).to_bytes(8, "little") + text)
        for local in tensors.values():
            put(local.tensor.view(-1).view(torch.uint8).numpy().data)
        file.flush()
        sync(path)
    return digest.hexdigest()


# ---- reading


def load(path: str | Path, *, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer | None = None) -> int:
    """Load a checkpoint into the same modules on any number of ranks and return the number of steps done.

    Every rank calls it. Frozen parameters are left as they are. Raises ValueError, on every rank, for a checkpoint of
    other modules; damage is for `damage` to find first.
    """
    path = Path(path)
    weights = _weights(modules)

    def fill() -> int:
        try:
            index = _Index.model_validate_json((path / _INDEX).read_bytes(), strict=True)
        except ValidationError as error:
            raise ValueError(f"{path / _INDEX} was not written by a run: {error.errors()[0]['msg']}") from None
        reader = _Reader(path, index.tensors)
        for name, weight in weights.items():
            known, expected = index.tensors.get(name), tuple(weight.shape)
            if known is None or tuple(known.shape) != expected:
                given = "absent" if known is None else tuple(known.shape)
                raise ValueError(f"{path} is of another model: {name} is {given}, expected {expected}")
        for name, weight in weights.items():
            reader.fill(name, weight)
        if optimizer is not None:
            _fill_moments(reader, weights, optimizer)
        return index.step

    return collectives.together(fill)


def _fill_moments(reader: "_Reader", weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    for name, weight in weights.items():
        prefix = f"optimizer/{name}/"
        # A parameter that no batch has used yet has no moments.
        for known in [key for key in reader.tensors if key.startswith(prefix)]:
            shape = tuple(reader.tensors[known].shape)
            alike = shape == tuple(weight.shape)
            moment = torch.zeros_like(weight) if alike else torch.zeros(shape, device=weight.device)
            reader.fill(known, moment)
            optimizer.state[weight][known.removeprefix(prefix)] = moment


class _Reader:
    """Read tensors, or this rank's rows of them, from the files of a checkpoint."""

    def __init__(self, folder: Path, tensors: dict[str, _Tensor]):
        self.tensors = tensors
        self._folder = folder
        self._files: dict[str, Any] = {}

    def fill(self, name: str, target: Tensor) -> None:
        """Copy a tensor of the checkpoint into `target`, which may be sharded."""
        local, parts = _local(target), self.tensors[name].parts
        if sum(rows for _, _, rows in parts) != (local.shape[0] if local.shape else 1):
            raise ValueError(f"{self._folder}: the parts of {name} are not all of it")
        if not local.shape:
            local.tensor.copy_(self._open(parts[0][0]).get_tensor(name))
            return
        stop = local.start + len(local.tensor)
        for file, first, rows in parts:
            low, high = max(local.start, first), min(stop, first + rows)
            if low < high:
                part = self._open(file).get_slice(name)[low - first : high - first]
                local.tensor[low - local.start : high - local.start].copy_(part)

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self._folder / file, framework="pt")
            except Exception as error:
                if (self._folder / file).exists():
                    raise ValueError(f"{self._folder / file} is not a safetensors file: {error}") from error
                # Deleted by the run that goes on, which safetensors says by a RuntimeError.
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._folder / file) from error
        return self._files[file]


# ---- finding


def list_checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """Return (step, path) of the checkpoints, oldest first; what was being written and other files are not seen."""
    matches = [(_STEP_FOLDER.fullmatch(path.name), path) for path in Path(folder).glob("step-*")]
    return sorted((int(match.group(1)), path) for match, path in matches if match)


def newest_whole(folder: str | Path) -> tuple[int, Path] | None:
    """Return the newest checkpoint without damage, on every rank; warn of damaged ones. None where there is none.

    Every rank calls it. Raises ValueError where all are damaged: to begin again is not for us to decide.
    """
    damaged: dict[Path, str] = {}
    while True:
        listed = on_rank_0(lambda: list_checkpoints(folder))
        step, path = next(((s, p) for s, p in reversed(listed) if p not in damaged), (0, None))
        if path is None:
            break
        problem = damage(path)
        if problem is None:
            if damaged and collectives.rank() == 0:
                warnings.warn(f"{'; '.join(damaged.values())}; going on from {path.name}", stacklevel=2)
            return step, path
        if on_rank_0(path.exists):  # else the run that goes on has deleted it meanwhile
            damaged[path] = problem
    if not listed:
        return None
    raise ValueError(f"no checkpoint is whole: {'; '.join(damaged.values())}. Bring one back, or delete {folder}")


def damage(path: Path) -> str | None:
    """Return the damage of a checkpoint in words, or None. Every rank calls it and reads a share of the files."""
    content = on_rank_0(lambda: (path / _SUMS).read_bytes() if (path / _SUMS).is_file() else b"")
    lines = [line.partition("  ") for line in content.decode(errors="replace").splitlines()]
    files = [file for _, _, file in lines]
    mine = files[collectives.rank() :: collectives.world_size()]
    shares = collectives.gather_objects({file: _digest(path, file) for file in mine})
    digests = {file: digest for share in shares for file, digest in share.items()}
    if _INDEX in files and _sums_text(digests).encode() == content:
        return None
    known = {file: digest for digest, _, file in lines}
    bad = next((file for file in digests if digests[file] != known[file]), _SUMS)
    return f"{path} is damaged: {bad} is missing or is not what was written"


def _sums_text(sums: Mapping[str, str]) -> str:
    # The index last, so that a list cut short lacks it.
    return "".join(f"{sums[file]}  {file}\n" for file in sorted(sums, key=lambda file: (file == _INDEX, file)))


def _digest(folder: Path, file: str) -> str:
    """Return a file's SHA-256; "" where it cannot be read, or is not a file of this folder."""
    if "/" in file or "\0" in file:
        return ""
    try:
        digest = hashlib.sha256()
        with (folder / file).open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()
    except OSError:
        return ""
