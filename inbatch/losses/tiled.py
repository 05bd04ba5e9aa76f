"""The functions of `kernels` in plain PyTorch, on any device: the CPU path and the fallback.

Shapes: R rows, C columns, D dimension, r rows of one chunk, f rows of a chunk that need another pivot.

Products run in float32 (float64 for float64), half-precision columns being widened tile by tile. A chunk of scores is
written once and then changed in place while the cache holds it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from inbatch.losses.kernels import MAX_EXPONENT, Block

DEFAULT_CHUNKS: tuple[tuple[float, float], ...] = (
    (32.0, math.inf),
)  # products want at least 256 rows; beyond 16 MiB speed is flat
ROW_MULTIPLE: int = 16
_WIDENED_COLUMNS = 4096


def why_not(queries: Tensor) -> str | None:
    return None


def exp_itemsize(dtype: torch.dtype) -> int:
    return torch.promote_types(dtype, torch.float32).itemsize


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
    dtype = torch.promote_types(block.columns.dtype, torch.float32)
    scaled_rD = block.rows[select].to(dtype) * block.scale[select, None]
    num_columns = block.columns.shape[0]
    scores_rC = scaled_rD.new_empty(scaled_rD.shape[0], num_columns)
    for tile, columns_cD in _widened(block.columns, dtype):
        torch.mm(scaled_rD, columns_cD.T, out=scores_rC[:, tile])
    positive_r = block.positive[select]
    local = ((positive_r >= 0) & (positive_r < num_columns)).nonzero().squeeze(1)
    positive_columns = positive_r[local]
    masked_rC = _masked(block, select, scores_rC)
    if masked_rC is not None:
        masked_rC[local, positive_columns] = False
        scores_rC.masked_fill_(masked_rC, -math.inf)
    scores_rC[local, positive_columns] = -math.inf
    return scores_rC, masked_rC


def _masked(block: Block, select: slice | Tensor, scores_rC: Tensor) -> Tensor | None:
    masked_rC = None if block.limit is None else scores_rC > block.limit[select, None]
    for row_keys, column_keys in block.keys:
        for row_key in row_keys[select].unbind(1):
            unknown_r = row_key == -1
            for column_key in column_keys.unbind(1):
                equal_rC = row_key[:, None] == column_key
                if unknown_r.any():
                    equal_rC[unknown_r] = False
                masked_rC = equal_rC if masked_rC is None else masked_rC.logical_or_(equal_rC)
    return masked_rC


def _widened(columns: Tensor, dtype: torch.dtype) -> Iterable[tuple[slice, Tensor]]:
    """The columns in the dtype of the products: all at once if they have it, else tile by tile."""
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
    sums: Sequence[Tensor], pivots: Sequence[Tensor], positive_r: Tensor, scale: Tensor | float, weight: float,
    loss_r: Tensor, coefficient_r: Tensor,
) -> list[Tensor]:  # fmt: skip
    # Relative to exp(positive + top). top is 0 unless a row needed another pivot; exp(-top) is the positive's term.
    shifts = [pivot_r - positive_r for pivot_r in pivots]
    top_r = shifts[0] if len(shifts) == 1 else torch.stack(shifts).amax(0)
    scales = [torch.exp(shift_r - top_r) for shift_r in shifts]
    total_r = sum((sum_r * scale_r for sum_r, scale_r in zip(sums, scales, strict=True)), torch.zeros_like(positive_r))
    share_r = (scale * weight) / (torch.exp(-top_r) + total_r)
    loss_r.copy_(weight * (top_r + torch.log1p(torch.expm1(-top_r) + total_r)))
    coefficient_r.copy_(-share_r * total_r)
    return [share_r * scale_r for scale_r in scales]


def add_gradients(
    block: Block, exp_rC: Tensor | None, start: int, stop: int, weight_r: Tensor, *, rows: bool, columns: bool
) -> None:
    assert exp_rC is not None
    dtype = exp_rC.dtype
    if rows and block.d_rows is not None:
        d_rows = block.d_rows[start:stop]
        product_rD = torch.empty_like(d_rows) if block.adds_to_rows else d_rows
        for tile, columns_cD in _widened(block.columns, dtype):
            product_rD.addmm_(exp_rC[:, tile], columns_cD, beta=1 if tile.start else 0)
        product_rD.mul_(weight_r[:, None])
        if block.adds_to_rows:
            d_rows += product_rD
    if columns and block.d_columns is not None:
        weighted_rD = block.rows[start:stop].to(dtype) * weight_r[:, None]
        block.d_columns.addmm_(exp_rC.T, weighted_rD, beta=1 if block.adds_to_columns or start > 0 else 0)


def close(
    queries: Tensor, passages: Tensor, positives: slice | Tensor, coefficient_B: Tensor,
    d_queries: Tensor | None, d_passages: Tensor | None, grad: Tensor,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    factor = coefficient_B[:, None] * grad
    if d_queries is not None:
        d_queries = torch.addcmul(d_queries * grad, factor, passages[positives]).to(queries.dtype)
    if d_passages is not None:
        d_passages = d_passages * grad
        add_rows(d_passages, positives, factor * queries)
        d_passages = d_passages.to(passages.dtype)
    return d_queries, d_passages


def add_rows(passages: Tensor, positives: slice | Tensor, values_BD: Tensor) -> None:
    """passages[positives] += values, in an order that is the same in every run."""
    if isinstance(positives, slice):
        passages[positives] += values_BD
    elif passages.is_cuda:
        passages.index_put_((positives,), values_BD, accumulate=True)  # sorts; index_add_ would race
    else:
        passages.index_add_(0, positives, values_BD)
