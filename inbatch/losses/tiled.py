"""The kernel functions of `blocks` in plain PyTorch, on any device: the CPU path and the fallback.

Shapes: R rows, C columns, D dimension, r rows of one chunk, f rows of a chunk that need another pivot.

Products run in float32 (float64 for float64), half-precision columns being widened tile by tile. A chunk of scores is
written once and then changed in place while the cache holds it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from inbatch.losses.blocks import MAX_EXPONENT, Block, accumulator_dtype

DEFAULT_CHUNKS = ((32.0, math.inf),)  # products want at least 256 rows; beyond 16 MiB speed is flat
ROW_MULTIPLE = 16
_WIDENED_COLUMNS = 4096


def why_not(queries: Tensor) -> str | None:
    return None


def exp_itemsize(dtype: torch.dtype) -> int:
    return accumulator_dtype(dtype).itemsize


def exp_scores(
    block: Block, start: int, stop: int, pivot_r: Tensor, *, keep: bool = True, counts: Tensor | None = None
) -> tuple[Tensor | None, Tensor, Tensor]:
    rows_r = torch.arange(start, stop, device=block.rows.device)
    exp_rC, masked_rC = _masked_scores(block, slice(start, stop), rows_r)
    if counts is not None:
        above_r = (exp_rC > pivot_r[:, None]).sum(1, dtype=torch.int32)
        left_out_r = torch.zeros_like(above_r) if masked_rC is None else masked_rC.sum(1, dtype=torch.int32)
        counts[start:stop] += torch.stack([left_out_r, above_r], dim=1)
    del masked_rC
    exp_rC.sub_(pivot_r[:, None]).exp_()
    sum_r = exp_rC.sum(1)
    too_large = (sum_r > math.exp(MAX_EXPONENT)).nonzero().squeeze(1)
    if too_large.numel():
        again_fC, _ = _masked_scores(block, rows_r[too_large], rows_r[too_large])
        top_f = again_fC.amax(1)
        again_fC.sub_(top_f[:, None]).exp_()
        sum_r[too_large] = again_fC.sum(1)
        exp_rC[too_large] = again_fC
        pivot_r = pivot_r.index_copy(0, too_large, top_f)
    return (exp_rC if keep else None), sum_r, pivot_r


def _masked_scores(block: Block, select: slice | Tensor, rows_r: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scores of some rows, -inf where a column is left out, and which columns the masks leave out (None: no masks)."""
    dtype = accumulator_dtype(block.columns.dtype)
    scaled_rD = block.rows[select].to(dtype) * block.scale[select, None]
    num_columns = block.columns.shape[0]
    scores_rC = scaled_rD.new_empty(scaled_rD.shape[0], num_columns)
    for tile, columns_cD in _widened(block.columns, dtype):
        torch.mm(scaled_rD, columns_cD.T, out=scores_rC[:, tile])
    own_r = block.own[select]
    # A row without an own column in this block is given a column beyond the end that is dropped again.
    local = (own_r >= 0).nonzero().squeeze(1)
    own_columns = own_r[local]
    masked_rC = _masked(block, select, scores_rC)
    if masked_rC is not None:
        masked_rC[local, own_columns] = False
        scores_rC.masked_fill_(masked_rC, -math.inf)
    scores_rC[local, own_columns] = -math.inf
    return scores_rC, masked_rC


def _masked(block: Block, select: slice | Tensor, scores_rC: Tensor) -> Tensor | None:
    masked_rC = None if block.limit is None else scores_rC > block.limit[select, None]
    equal_rC = None
    for row_keys, column_keys in block.keys:
        for row_key in row_keys[select].unbind(1):
            for column_key in column_keys.unbind(1):
                if masked_rC is None:
                    masked_rC = row_key[:, None] == column_key
                else:
                    equal_rC = torch.eq(row_key[:, None], column_key, out=equal_rC)
                    masked_rC |= equal_rC
    return masked_rC


def _widened(columns: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The columns in the dtype of the products: all at once if they have it, else in tiles."""
    num_columns = columns.shape[0]
    if columns.dtype == dtype or num_columns == 0:
        yield slice(0, num_columns), columns.to(dtype)
        return
    for start in range(0, num_columns, _WIDENED_COLUMNS):
        tile = slice(start, min(start + _WIDENED_COLUMNS, num_columns))
        yield tile, columns[tile].to(dtype)


def positive_scores(rows: Tensor, positives: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return torch.linalg.vecdot(rows.to(scale.dtype), positives.to(scale.dtype)) * scale, scale.expand(rows.shape[0])


def finish(
    sums: Sequence[Tensor], pivots: Sequence[Tensor], positive_r: Tensor, factor: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Relative to exp(positive + top). top is 0 unless a row needed another pivot; exp(-top) is the positive's term."""
    shifts = [pivot_r - positive_r for pivot_r in pivots]
    top_r = shifts[0] if len(shifts) == 1 else torch.stack(shifts).amax(0)
    scales = [torch.exp(shift_r - top_r) for shift_r in shifts]
    total_r = sum((sum_r * scale_r for sum_r, scale_r in zip(sums, scales, strict=True)), torch.zeros_like(positive_r))
    share_r = factor / (torch.exp(-top_r) + total_r)
    loss_r = top_r + torch.log1p(torch.expm1(-top_r) + total_r)
    return loss_r, [share_r * scale_r for scale_r in scales], -share_r * total_r


def add_gradients(
    block: Block,
    exp_rC: Tensor,
    start: int,
    stop: int,
    weight_r: Tensor,
    d_rows: Tensor | None,
    d_columns: Tensor | None,
    *,
    fresh_rows: bool,
    fresh_columns: bool,
) -> None:
    dtype = exp_rC.dtype
    if d_rows is not None:
        product_rD = d_rows[start:stop] if fresh_rows else torch.zeros_like(d_rows[start:stop])
        for tile, columns_cD in _widened(block.columns, dtype):
            product_rD.addmm_(exp_rC[:, tile], columns_cD, beta=0 if fresh_rows and tile.start == 0 else 1)
        product_rD.mul_(weight_r[:, None])
        if not fresh_rows:
            d_rows[start:stop] += product_rD
    if d_columns is not None:
        weighted_rD = block.rows[start:stop].to(dtype) * weight_r[:, None]
        d_columns.addmm_(exp_rC.T, weighted_rD, beta=0 if fresh_columns else 1)
