"""The unit of work of every kernel: rows against columns, and which pairs are left out.

Shapes: R rows, C columns, D dimension, K keys of a row, L keys of a column, r rows of one chunk.

`tiled` (plain PyTorch) and `fused` (Triton) offer the same four functions; `driver` (all columns at hand) and `ring`
(columns arriving in blocks) call them and know nothing else about how scores are computed.

    positive_scores(rows, positives, scale) -> (score_R, scale_R)

        score_i = scale_i * rows_i . positives_i; scale_i is the 0-d scale, corrected for what the kernel's own rounding
        takes from a product of row i

    exp_scores(block, start, stop, pivot_r, *, keep=True, counts=None) -> (exp_rC, sum_r, pivot_r)

        s_ij = scale_i * rows_i . columns_j in float32 (float64 for float64 inputs), for rows start..stop
        E_ij = exp(s_ij - pivot_i); exactly 0 on the row's own column and on every masked column
        exp_rC  E in the dtype of the gradient products (None with keep=False, which wants only the sums)
        sum_r   sum_j E_ij in float32, taken before E is rounded
        pivot_r the pivots used: those given, but the row's greatest score wherever it exceeds the pivot given by more
                than MAX_EXPONENT, so that nothing overflows and nothing is clamped. The tensor given is not changed.
        counts  int32 [R, 2] or None; adds to counts[start:stop] per row the number of masked columns (own column not
                counted) and the number of unmasked columns with s_ij > the pivot GIVEN (the positive's score)

    finish(sums, pivots, positive_r, factor) -> (loss_r, weights, coefficient_r)

        sums, pivots: one [r] tensor for each block of the softmax; positive_r the positive's score; factor 0-d.
        Z_i = exp(positive_i) + sum over blocks of exp(pivot_i) * sum_i;    loss_i = log Z_i - positive_i
        weights: one [r] tensor a block: factor * exp(pivot_i) / Z_i
        coefficient_i = -factor * (1 - exp(positive_i) / Z_i)
        A tiny loss or coefficient keeps its digits (log1p of the sums; never 1 - p).

    add_gradients(block, exp_rC, start, stop, weight_r, d_rows, d_columns, *, fresh_rows, fresh_columns) -> None

        d_rows[start:stop] += weight_r * (E @ columns);    d_columns += E^T @ (weight_r * rows[start:stop])
        d_rows [R, D] and d_columns [C, D] are float32 (float64 for float64), either may be None (not wanted).
        fresh_*: the destination holds garbage and is overwritten, not added to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# exp(60) * 2**24 columns still fits float32 and bfloat16 with room for the products, and exp(-60) is no denormal.
MAX_EXPONENT = 60.0


@dataclass(frozen=True, kw_only=True)
class Block:
    """Rows [R, D] against columns [C, D] (same dtype and device, contiguous last dimension; R or C may be 0).

    own     int32 [R]: the column left out of E and never counted (the positive, or the row itself); -1: none here
    scale   float32 [R] (float64 for float64 inputs): 1 / temperature, from `positive_scores`
    keys    pairs (row keys int32 [R, K], column keys int32 [C, L]), at most two; a pair (i, j) is masked when any key
            of row i equals any key of column j. Rows use -1 and columns -2 for "nothing": equality alone decides.
    limit   float32 [R] or None: a column with s_ij > limit_i is masked
    """

    rows: Tensor
    columns: Tensor
    own: Tensor
    scale: Tensor
    keys: tuple[tuple[Tensor, Tensor], ...] = ()
    limit: Tensor | None = None


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, sums and gradient accumulators."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def refuse_second_derivatives() -> None:
    """In a backward pass of gradients made beforehand: they are constants to autograd, which would take them for 0."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "info_nce is differentiable once, and this backward pass has create_graph=True; "
            'impl="reference" has second derivatives'
        )
