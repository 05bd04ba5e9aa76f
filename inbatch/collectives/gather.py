"""Gather rows of all ranks, with gradient, and add rows up over the ranks.

`group`, ranks and `rows` are as in `inbatch.collectives`, which passes these names on.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from inbatch.collectives.agreement import agree, gather_into
from inbatch.collectives.process_group import ProcessGroup, rank, world_size

_NO_ROWS = "all_gather: expected a tensor with rows (1-d or more), got a 0-d tensor: pass tensor[None]"

# As for gather_into: torch 2.13 warns on the old name.
_reduce_scatter_into: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


def all_gather(tensor: Tensor, group: ProcessGroup | None = None, *, rows: Sequence[int] | None = None) -> Tensor:
    """Concatenate the ranks' tensors along dim 0, in rank order, with gradient.

        out = cat([tensor of rank 0, ..., tensor of rank W-1])          d tensor = (sum over ranks of d out)[my rows]

    tensor: [R_r, ...] of any dtype, 1-d or more. R_r may differ between ranks and may be 0; all else must agree.
    rows: the R_r if the ranks have already agreed (nothing is checked then); None exchanges them first, see `agree`.
    Returns [sum of R_r, ...]; with one process the very same object.

    The backward is one reduce-scatter, so every rank must run it, or none. float16 and bfloat16 gradients travel and
    are added in float32 and rounded once: twice the bytes, but no rounding per hop.
    Works inside torch.compile(fullgraph=True), the agreement included (before torch 2.13, rows=None needs
    torch._dynamo.config.capture_dynamic_output_shape_ops).

    Raises ValueError on every rank if ranks disagree on dtype, trailing shape or requires_grad, or a tensor is 0-d.
    """
    if world_size(group) == 1:
        if tensor.ndim == 0:
            raise ValueError(_NO_ROWS)
        return tensor
    name = "" if group is None else group.group_name
    differentiable = tensor.requires_grad and torch.is_grad_enabled()
    return _gather_op(tensor, name, None if rows is None else list(rows), differentiable)[0]


def _resolve(name: str) -> ProcessGroup | None:
    from torch._C._distributed_c10d import _resolve_process_group

    return _resolve_process_group(name) if name else None  # pyright: ignore[reportArgumentType]


# An operator of our own is opaque to torch.compile, so the output's size may depend on what other ranks hold.
@torch.library.custom_op("inbatch::all_gather_rows", mutates_args=())
def _gather_op(tensor: Tensor, group: str, rows: list[int] | None, differentiable: bool) -> tuple[Tensor, Tensor]:
    """Return the gathered tensor and the row counts [W] (int64 on the CPU, for the backward)."""
    pg = _resolve(group)
    if rows is None:
        error = None if tensor.ndim else _NO_ROWS
        same = {"requires_grad": differentiable}  # in here the tensor itself does not tell
        rows = agree("all_gather", {"tensor": tensor.detach()}, group=pg, same=same, error=error)["tensor"]
    elif len(rows) != world_size(pg) or rows[rank(pg)] != len(tensor):
        raise ValueError(
            f"all_gather: rows {rows} do not fit {world_size(pg)} ranks and {len(tensor)} rows on rank {rank(pg)}"
        )
    return gather_rows(tensor, rows, pg), torch.tensor(rows, dtype=torch.int64)


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


def _reduce_scatter_setup(ctx, inputs, output) -> None:
    _, rows, ctx.group, _ = inputs
    ctx.save_for_backward(rows)


def _reduce_scatter_backward(ctx, grad):
    (rows,) = ctx.saved_tensors
    return _gather_op(grad, ctx.group, rows.tolist(), True)[0], None, None, None


_reduce_scatter_op.register_autograd(_reduce_scatter_backward, setup_context=_reduce_scatter_setup)


def gather_rows(tensor: Tensor, rows: Sequence[int], group: ProcessGroup | None = None) -> Tensor:
    """Concatenate the ranks' tensors as `all_gather` does, without gradient and without agreement.

    rows: the row counts by rank. Bytes travel, so that every dtype works on every backend. With one process the very
    same object.
    """
    if len(rows) == 1:
        return tensor
    mine, longest = tensor.shape[0], max(rows)
    even = min(rows) == longest
    if even:
        source = tensor.contiguous()
    else:
        source = tensor.new_empty(longest, *tensor.shape[1:])
        source[:mine] = tensor
    gathered = tensor.new_empty(len(rows) * longest, *tensor.shape[1:])
    if gathered.numel():
        gather_into(gathered.view(-1).view(torch.uint8), source.view(-1).view(torch.uint8), group=group)
    if even:
        return gathered
    return torch.cat([part[:n] for part, n in zip(gathered.split(longest), rows, strict=True)])


def reduce_scatter_rows(tensor: Tensor, rows: Sequence[int], group: ProcessGroup | None = None) -> Tensor:
    """Add `tensor` [sum(rows), ...] over the ranks and return this rank's rows. No gradient.

    float16 and bfloat16 travel and are added in float32, see `all_gather`. With one process: the very same object.
    """
    if len(rows) == 1:
        return tensor
    mine, longest = rows[dist.get_rank(group)], max(rows)
    wide = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
    if min(rows) == longest:
        source = tensor.contiguous().to(wide)
    else:
        source = tensor.new_zeros(len(rows) * longest, *tensor.shape[1:], dtype=wide)
        for part, target in zip(tensor.split(list(rows)), source.split(longest), strict=True):
            target[: part.shape[0]] = part
    out = source.new_empty(longest, *tensor.shape[1:])
    if out.numel():
        _reduce_scatter_into(out, source, group=group)
    return out[:mine].to(tensor.dtype)


def all_reduce(tensor: Tensor, op: str = "sum", group: ProcessGroup | None = None) -> Tensor:
    """Reduce in place over the ranks ("sum" or "max") and return the tensor. No gradient."""
    if world_size(group) > 1:
        dist.all_reduce(tensor, getattr(dist.ReduceOp, op.upper()), group=group)
    return tensor


def max_over_ranks(value: int, group: ProcessGroup | None = None) -> int:
    """Return the largest of the ranks' values; every rank calls it. `GradCache` needs it under FSDP2."""
    return max(agree("max_over_ranks", sizes={"value": value}, group=group)["value"])
