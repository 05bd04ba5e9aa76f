"""The functions of `kernels` in plain PyTorch, on any device: the CPU path and the fallback.

Shapes: R rows of a chunk, C columns, c columns of a tile, D dimension, f rows that need another pivot.

Products run in float32 (float64 for float64), half-precision columns being widened tile by tile. A chunk of scores is
written once and then changed in place while the cache holds it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from inbatch.losses.kernels import MAX_EXPONENT, Block
from inbatch.losses.masking import by_group, mask

# Products want at least 256 rows; beyond 16 MiB speed is flat.
DEFAULT_CHUNKS: tuple[tuple[float, float], ...] = ((32.0, math.inf),)
ROW_MULTIPLE: int = 16
_WIDENED_COLUMNS = 4096


def exp_itemsize(dtype: torch.dtype) -> int:
    return torch.promote_types(dtype, torch.float32).itemsize


def exp_scores(block: Block, pivot_R: Tensor, *, keep: bool = True) -> tuple[Tensor | None, Tensor, Tensor]:
    exp_RC, masked_RC = _masked_scores(block)
    if block.counts is not None:
        above_R = (exp_RC > pivot_R[:, None]).sum(1, dtype=torch.int32)
        left_out_R = torch.zeros_like(above_R) if masked_RC is None else masked_RC.sum(1, dtype=torch.int32)
        block.counts.add_(torch.stack([left_out_R, above_R], dim=1))
    del masked_RC
    exp_RC.sub_(pivot_R[:, None]).exp_()
    sum_R = exp_RC.sum(1)
    too_large = (sum_R > math.exp(MAX_EXPONENT)).nonzero().squeeze(1)
    if too_large.numel():
        again_fC, _ = _masked_scores(block.select(too_large))
        top_f = again_fC.amax(1)
        again_fC.sub_(top_f[:, None]).exp_()
        sum_R[too_large] = again_fC.sum(1)
        exp_RC[too_large] = again_fC
        pivot_R = pivot_R.index_copy(0, too_large, top_f)
    return (exp_RC if keep else None), sum_R, pivot_R


def _masked_scores(block: Block) -> tuple[Tensor, Tensor | None]:
    """Return scores, -inf where a column is left out, and which columns the masks leave out (None: no masks)."""
    scaled_RD = block.rows.to(torch.promote_types(block.columns.dtype, torch.float32)) * block.scale[:, None]
    num_columns = block.columns.shape[0]
    scores_RC = scaled_RD.new_empty(scaled_RD.shape[0], num_columns)
    for tile, columns_cD in _widened(block.columns, scaled_RD.dtype):
        torch.mm(scaled_RD, columns_cD.T, out=scores_RC[:, tile])
    local = ((block.positive >= 0) & (block.positive < num_columns)).nonzero().squeeze(1)
    positives = block.positive[local]
    masked_RC = mask(block.keys, len(scores_RC), num_columns, scores_RC.device) if block.keys else None
    if block.limit is not None:
        above_RC = scores_RC > block.limit[:, None]
        masked_RC = above_RC if masked_RC is None else masked_RC.logical_or_(above_RC)
    if (groups := block.groups) is not None:
        own_RC, left_out_RC, kept_RC = by_group(groups.rows, groups.columns, groups.rules)
        scores_RC.mul_(torch.where(own_RC, groups.own[:, None], groups.others[:, None]))
        masked_RC = left_out_RC if masked_RC is None else masked_RC.logical_and_(~kept_RC).logical_or_(left_out_RC)
    if masked_RC is not None:
        masked_RC[local, positives] = False
        scores_RC.masked_fill_(masked_RC, -math.inf)
    scores_RC[local, positives] = -math.inf
    return scores_RC, masked_RC


def _widened(columns: Tensor, dtype: torch.dtype) -> Iterable[tuple[slice, Tensor]]:
    """Return the columns in the dtype of the products: all at once if they have it, else tile by tile."""
    num_columns = columns.shape[0]
    if columns.dtype == dtype or num_columns == 0:
        return ((slice(0, num_columns), columns.to(dtype)),)
    tiles = (slice(start, start + _WIDENED_COLUMNS) for start in range(0, num_columns, _WIDENED_COLUMNS))
    return ((tile, columns[tile].to(dtype)) for tile in tiles)


def positive_scores(rows: Tensor, positives: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(rows.dtype, torch.float32)
    scale_R = scale.expand(len(rows)) if isinstance(scale, Tensor) else rows.new_full((len(rows),), scale, dtype=dtype)
    return torch.linalg.vecdot(rows.to(dtype), positives.to(dtype)) * scale, scale_R


def finish(
    sums: Sequence[Tensor], pivots: Sequence[Tensor], positive_R: Tensor, scale: Tensor | float, weight: float,
    loss_R: Tensor, coefficient_R: Tensor,
) -> list[Tensor]:  # fmt: skip
    # Relative to exp(positive + top). top is 0 unless a row needed another pivot; exp(-top) is the positive's term.
    shifts = [pivot_R - positive_R for pivot_R in pivots]
    top_R = shifts[0] if len(shifts) == 1 else torch.stack(shifts).amax(0)
    scales = [torch.exp(shift_R - top_R) for shift_R in shifts]
    total_R = sum((sum_R * scale_R for sum_R, scale_R in zip(sums, scales, strict=True)), torch.zeros_like(positive_R))
    share_R = (scale * weight) / (torch.exp(-top_R) + total_R)
    loss_R.copy_(weight * (top_R + torch.log1p(torch.expm1(-top_R) + total_R)))
    coefficient_R.copy_(-share_R * total_R)
    return [share_R * scale_R for scale_R in scales]


def add_gradients(block: Block, exp_RC: Tensor | None, weight_R: Tensor, *, rows: bool, columns: bool) -> None:
    assert exp_RC is not None
    if rows and block.d_rows is not None:
        product_RD = torch.empty_like(block.d_rows) if block.adds_to_rows else block.d_rows
        for tile, columns_cD in _widened(block.columns, exp_RC.dtype):
            product_RD.addmm_(exp_RC[:, tile], columns_cD, beta=1 if tile.start else 0)
        product_RD.mul_(weight_R[:, None])
        if block.adds_to_rows:
            block.d_rows.add_(product_RD)
    if columns and block.d_columns is not None:
        weighted_RD = block.rows.to(exp_RC.dtype) * weight_R[:, None]
        block.d_columns.addmm_(exp_RC.T, weighted_RD, beta=1 if block.adds_to_columns else 0)


def close(
    queries: Tensor, passages: Tensor, positives: slice | Tensor, coefficient_B: Tensor,
    d_queries: Tensor | None, d_passages: Tensor | None, grad: Tensor, dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    factor = coefficient_B[:, None] * grad
    if d_queries is not None:
        d_queries = torch.addcmul(d_queries * grad, factor, passages[positives]).to(dtype)
    if d_passages is not None:
        d_passages = d_passages * grad
        add_rows(d_passages, positives, factor * queries)
        d_passages = d_passages.to(dtype)
    return d_queries, d_passages


def add_rows(passages: Tensor, positives: slice | Tensor, values_BD: Tensor) -> None:
    """Add `values` to passages[positives], in an order that is the same in every run."""
    if isinstance(positives, slice):
        passages[positives] += values_BD
    elif passages.is_cuda:
        passages.index_put_((positives,), values_BD, accumulate=True)  # sorts; index_add_ would race
    else:
        passages.index_add_(0, positives, values_BD)
