"""Collectives over rows: gathers with gradient, uneven and empty ranks, any process group.

The only module that names torch.distributed operations. `group` is a ProcessGroup, None is the default group, or a world
of one process where none is initialised. A rank is a position within its group. Everything but `all_gather` and
`all_reduce` reads its sizes from `rows`, the row counts that the ranks have agreed on.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

T = TypeVar("T")
_MAX_FIELDS = 16

# torch 2.13 renamed the tensor collectives and warns on the old names.
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


# ---- who is in the group


def world_size(group: ProcessGroup | None = None) -> int:
    """Number of processes in the group; 1 without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    size = dist.get_world_size(group)
    if size < 1:
        raise ValueError("this process is not a member of the given process group: call with a group it belongs to")
    return size


def rank(group: ProcessGroup | None = None) -> int:
    """This process's position in the group; 0 without a process group."""
    return dist.get_rank(group) if world_size(group) > 1 else 0


def _device_types(group: ProcessGroup | None) -> list[str]:
    return [pair.split(":")[0] for pair in dist.get_backend_config(group).split(",")]


def _packet_device(group: ProcessGroup | None) -> torch.device:
    """Where small packets travel: on the CPU if the group can, since reading them back then stalls no GPU."""
    types = _device_types(group)
    return torch.device("cpu") if "cpu" in types else torch.device(types[0], torch.accelerator.current_device_index())


# ---- the agreement


def agree(
    what: str,
    fields: Mapping[str, Tensor | None],
    *,
    group: ProcessGroup | None = None,
    same: Mapping[str, int | float | str | bool | None] | None = None,
    error: str | None = None,
) -> dict[str, list[int]]:
    """Checks in one small exchange that all ranks are about to do the same thing; raises the same error on all if not.

    Ranks must agree on `what`, on the value of everything in `same`, and for each field on presence, dtype, shape but for
    the row count (dim 0), and on whether it requires grad. `error` tells the others of a mistake found locally.

    Returns the row counts by rank of every field that is present (a 0-d tensor counts as one row). At most 16 fields.
    Raises ValueError naming ranks, shapes and dtypes. Costs one all-gather of 18 integers; it stalls the GPU
    only where the group has no CPU backend.
    """
    assert len(fields) <= _MAX_FIELDS, f"agree takes at most {_MAX_FIELDS} fields, not {len(fields)}"
    size = world_size(group)
    present = {name: tensor for name, tensor in fields.items() if tensor is not None}
    counts = {name: tensor.shape[0] if tensor.ndim else 1 for name, tensor in present.items()}
    if size == 1:
        if error is not None:
            raise ValueError(error)
        return {name: [count] for name, count in counts.items()}
    error = error or _wrong_device(present, group)
    described = {name: _describe(tensor) for name, tensor in fields.items()} | {
        name: repr(value) for name, value in (same or {}).items()
    }
    digest = hashlib.blake2b(repr((what, described)).encode(), digest_size=8).digest()
    head = [int(error is not None), int.from_bytes(digest, "little", signed=True)]
    row_counts = [counts.get(name, 0) for name in fields]
    packets = _exchange(head + row_counts + [0] * (_MAX_FIELDS - len(fields)), group)
    if any(packet[0] or packet[1] != packets[0][1] for packet in packets):
        raise ValueError(_disagreement(gather_objects((what, described, error), group)))
    return {name: [packet[2 + i] for packet in packets] for i, name in enumerate(fields) if name in present}


def _exchange(numbers: list[int], group: ProcessGroup | None) -> list[list[int]]:
    size = world_size(group)
    mine = torch.tensor(numbers, dtype=torch.int64, device=_packet_device(group))
    everyone = mine.new_empty(size * len(numbers))
    _gather_into(everyone, mine, group=group)
    return everyone.view(size, -1).tolist()


def _describe(tensor: Tensor | None) -> str:
    if tensor is None:
        return "None"
    shape = ", ".join(["rows", *map(str, tensor.shape[1:])]) if tensor.ndim else ""
    grad = " requiring grad" if tensor.requires_grad and torch.is_grad_enabled() else ""
    return f"({shape}) {str(tensor.dtype).removeprefix('torch.')}{grad}"


def _wrong_device(present: Mapping[str, Tensor], group: ProcessGroup | None) -> str | None:
    types = _device_types(group)
    for name, tensor in present.items():
        if tensor.device.type not in types:
            return (
                f"{name} is on {tensor.device.type} but the process group only communicates on {', '.join(types)}: "
                "move it there, or initialise the group with a backend for both ('cpu:gloo,cuda:nccl')"
            )
    return None


def _disagreement(reports: list[tuple[str, dict[str, str], str | None]]) -> str:
    errors = [f"rank {r}: {error}" for r, (_, _, error) in enumerate(reports) if error is not None]
    if errors:
        return "; ".join(errors)
    calls = [what for what, _, _ in reports]
    if len(set(calls)) > 1:
        return "the ranks are in different calls: " + _by_rank(calls)
    names = list(dict.fromkeys(name for _, described, _ in reports for name in described))
    parts = []
    for name in names:
        values = [described.get(name, "nothing of that name") for _, described, _ in reports]
        if len(set(values)) > 1:
            parts.append(f"{name}: {_by_rank(values)}")
    return f"{calls[0]}: the ranks disagree; only the number of rows may differ. " + "; ".join(parts)


def _by_rank(values: list[str]) -> str:
    """Groups ranks that say the same: "ranks 0, 1 have x, rank 2 has y"."""
    groups: dict[str, list[str]] = {}
    for r, value in enumerate(values):
        groups.setdefault(value, []).append(str(r))
    return ", ".join(
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)} ha{'ve' if len(ranks) > 1 else 's'} {value}"
        for value, ranks in groups.items()
    )


# ---- gathers


def all_gather(tensor: Tensor, group: ProcessGroup | None = None, *, rows: Sequence[int] | None = None) -> Tensor:
    """Concatenates the ranks' tensors along dim 0, in rank order, with gradient.

        out = cat([tensor of rank 0, ..., tensor of rank W-1])          d tensor = (sum over ranks of d out)[my rows]

    tensor: [R_r, ...] of any dtype, 1-d or more. R_r may differ between ranks and may be 0; all else must agree.
    rows: the R_r, if already agreed; None exchanges them first (`agree`).
    Returns [sum of R_r, ...]; with one process the very same object. The backward is a reduce-scatter that adds
    float16 and bfloat16 in float32, so that the result does not depend on the number of ranks or their order.
    Every rank must run the backward, or none. Works inside torch.compile(fullgraph=True).

    Raises ValueError on every rank where ranks disagree on dtype, trailing shape or requires_grad, or a tensor is 0-d.
    """
    if world_size(group) == 1:
        if tensor.ndim == 0:
            raise ValueError("all_gather needs a tensor with rows (1-d or more), got a 0-d tensor: use tensor[None]")
        return tensor
    differentiable = tensor.requires_grad and torch.is_grad_enabled()
    return _gather_op(tensor, _name(group), None if rows is None else list(rows), differentiable)[0]


def _name(group: ProcessGroup | None) -> str:
    return "" if group is None else group.group_name


def _resolve(name: str) -> ProcessGroup | None:
    return dist.distributed_c10d._resolve_process_group(name) if name else None  # pyright: ignore[reportArgumentType]


@torch.library.custom_op("inbatch::all_gather_rows", mutates_args=())
def _gather_op(tensor: Tensor, group: str, rows: list[int] | None, differentiable: bool) -> tuple[Tensor, Tensor]:
    """Returns the gathered tensor and the row counts (on the CPU, for the backward)."""
    pg = _resolve(group)
    if rows is None:
        error = None if tensor.ndim else "all_gather needs a tensor with rows (1-d or more), got a 0-d tensor"
        tensor_seen = tensor.detach().requires_grad_(differentiable)
        with torch.enable_grad():
            rows = agree("all_gather", {"tensor": tensor_seen}, group=pg, error=error)["tensor"]
    return _gather_rows(tensor, rows, pg), torch.tensor(rows, dtype=torch.int64)


@_gather_op.register_fake
def _(tensor, group, rows, differentiable):
    total = torch.library.get_ctx().new_dynamic_size() if rows is None else sum(rows)
    size = world_size(_resolve(group))
    return tensor.new_empty(total, *tensor.shape[1:]), torch.empty(size, dtype=torch.int64, device="cpu")


def _gather_setup(ctx, inputs, output) -> None:
    tensor, ctx.group, _, _ = inputs
    ctx.local_rows = tensor.shape[0]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _gather_backward(ctx, grad, _):
    (rows,) = ctx.saved_tensors
    return _reduce_scatter_op(grad, rows, ctx.group, ctx.local_rows), None, None, None


_gather_op.register_autograd(_gather_backward, setup_context=_gather_setup)


@torch.library.custom_op("inbatch::reduce_scatter_rows", mutates_args=())
def _reduce_scatter_op(tensor: Tensor, rows: Tensor, group: str, local_rows: int) -> Tensor:
    return reduce_scatter_rows(tensor, rows.tolist(), _resolve(group))


@_reduce_scatter_op.register_fake
def _(tensor, rows, group, local_rows):
    return tensor.new_empty(local_rows, *tensor.shape[1:])


def _gather_rows(tensor: Tensor, rows: Sequence[int], group: ProcessGroup | None) -> Tensor:
    """The gather itself, without autograd. Moves bytes, so that every dtype works on every backend."""
    longest, mine = max(rows), rows[rank(group)]
    tail = tensor.shape[1:]
    assert tensor.shape[0] == mine, f"this rank has {tensor.shape[0]} rows, agreed were {mine}"
    even = min(rows) == longest
    source = tensor.contiguous()
    if not even:
        source = tensor.new_empty(longest, *tail)
        source[:mine] = tensor
    gathered = tensor.new_empty(len(rows) * longest, *tail)
    if gathered.numel():
        _gather_into(_bytes(gathered), _bytes(source), group=group)
    if even:
        return gathered
    return torch.cat([part[:n] for part, n in zip(gathered.split(longest), rows, strict=True)])


def _bytes(contiguous: Tensor) -> Tensor:
    return contiguous.view(-1).view(torch.uint8)


def reduce_scatter_rows(tensor: Tensor, rows: Sequence[int], group: ProcessGroup | None = None) -> Tensor:
    """Adds `tensor` [sum(rows), ...] over the ranks and returns this rank's rows. No gradient.

    float16 and bfloat16 travel and are added in float32 and rounded once: twice the bytes, but no rounding per hop.
    """
    if len(rows) == 1:
        return tensor.clone()
    mine, longest, tail = rows[rank(group)], max(rows), tensor.shape[1:]
    wide = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
    if min(rows) == longest:
        source = tensor.contiguous().to(wide)
    else:
        source = tensor.new_zeros(len(rows) * longest, *tail, dtype=wide)
        for part, target in zip(tensor.split(list(rows)), source.split(longest), strict=True):
            target[: part.shape[0]] = part
    out = source.new_empty(longest, *tail)
    if out.numel():
        _reduce_scatter_into(out, source, group=group)
    return out[:mine].to(tensor.dtype)


def all_reduce(tensor: Tensor, op: str = "sum", group: ProcessGroup | None = None) -> Tensor:
    """Reduces in place over the ranks ("sum", "max" or "min") and returns the tensor. No gradient."""
    if world_size(group) > 1:
        dist.all_reduce(tensor, getattr(dist.ReduceOp, op.upper()), group=group)
    return tensor


# ---- the ring


class RingShift:
    """A shift under way: `wait()` returns the tensors that came from the previous rank."""

    def __init__(self, received: list[Tensor], works: list, sent: list[Tensor]):
        self._received, self._works, self._sent = received, works, sent

    def wait(self) -> list[Tensor]:
        for work in self._works:
            work.wait()
        self._works, self._sent = [], []  # what was sent had to live until here
        return self._received


def ring_shift(tensors: Sequence[Tensor], rows: Sequence[int], group: ProcessGroup | None = None) -> RingShift:
    """Starts sending each tensor to the next rank and receiving its counterpart from the previous rank.

    tensors: each [rows[rank], ...], any dtypes. rows: how many rows each rank holds NOW, before the shift: what arrives
    has rows[rank - 1]. Runs beside computation until `.wait()`; the tensors must not be written to before that.
    """
    size, me = world_size(group), rank(group)
    if size == 1:
        return RingShift(list(tensors), [], [])
    assert all(t.shape[0] == rows[me] for t in tensors), f"expected {rows[me]} rows, got {[t.shape for t in tensors]}"
    sent = [t.contiguous() for t in tensors]
    received = [t.new_empty(rows[me - 1], *t.shape[1:]) for t in tensors]
    to, source = _global_rank((me + 1) % size, group), _global_rank((me - 1) % size, group)
    ops = []
    for tag, (out, into) in enumerate(zip(sent, received, strict=True)):
        if out.numel():
            ops.append(dist.P2POp(dist.isend, _bytes(out), to, group, tag))
        if into.numel():
            ops.append(dist.P2POp(dist.irecv, _bytes(into), source, group, tag))
    return RingShift(received, dist.batch_isend_irecv(ops) if ops else [], sent)


def _global_rank(group_rank: int, group: ProcessGroup | None) -> int:
    return group_rank if group is None else dist.get_global_rank(group, group_rank)


# ---- objects and control


def gather_objects(obj: Any, group: ProcessGroup | None = None) -> list:
    """Every rank's (picklable) object, in rank order."""
    size = world_size(group)
    if size == 1:
        return [obj]
    objects: list = [None] * size
    dist.all_gather_object(objects, obj, group=group)
    return objects


def broadcast_object(obj: T, src: int = 0, group: ProcessGroup | None = None) -> T:
    """The (picklable) object of rank `src` of the group."""
    if world_size(group) == 1:
        return obj
    objects = [obj]
    dist.broadcast_object_list(objects, src=_global_rank(src, group), group=group)
    return objects[0]


def barrier(group: ProcessGroup | None = None) -> None:
    """Returns once every rank has come here."""
    if world_size(group) > 1:
        _exchange([0], group)


def together(function: Callable[[], T], group: ProcessGroup | None = None) -> T:
    """Calls function() on every rank and returns its value; if it raises on any rank, every rank raises.

    A rank whose own call failed raises its own exception. The others raise RuntimeError (ValueError if the first failure
    was one) that names the rank and its message. The function must not communicate.
    """
    failure, value = None, None
    try:
        value = function()
    except Exception as error:
        if world_size(group) == 1:
            raise
        failure = error
    if world_size(group) > 1 and any(packet[0] for packet in _exchange([int(failure is not None)], group)):
        report = None if failure is None else (isinstance(failure, ValueError), f"{type(failure).__name__}: {failure}")
        reports = [(r, *found) for r, found in enumerate(gather_objects(report, group)) if found is not None]
        if failure is not None:
            raise failure
        message = "; ".join(f"rank {r}: {text}" for r, _, text in reports)
        raise (ValueError if reports[0][1] else RuntimeError)(message)
    return value  # pyright: ignore[reportReturnType]


# ---- start and stop


def start(backend: str | None = None, timeout_s: float = 300) -> torch.device:
    """Initialises the default process group from torchrun's environment and returns this process's device.

    Without that environment (RANK is not set) nothing is initialised: one process. backend None is NCCL for CUDA tensors
    and gloo for CPU tensors where there is a GPU per local rank, else gloo. timeout_s bounds every collective.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    use_cuda = torch.cuda.is_available() and backend != "gloo"
    here = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"LOCAL_RANK is {local_rank} but there are {torch.cuda.device_count()} GPUs: start fewer processes"
            )
        torch.cuda.set_device(here)
    if "RANK" not in os.environ or dist.is_initialized():
        return here
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f"RANK is set but {', '.join(missing)} is not: start with torchrun, or unset RANK for one process"
        )
    dist.init_process_group(
        backend or ("cpu:gloo,cuda:nccl" if use_cuda else "gloo"),
        timeout=timedelta(seconds=timeout_s),
        device_id=here if use_cuda else None,
    )
    return here


def stop() -> None:
    """Destroys the default process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def device() -> torch.device:
    """The device of this process, as `start` bound it: the current GPU, or the CPU."""
    if torch.cuda.is_available() and not (dist.is_initialized() and "cuda" not in dist.get_backend_config()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
