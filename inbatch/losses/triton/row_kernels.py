"""Triton kernels over single rows, around the tiles of `tile_kernels`: few, because a small batch waits for launches.

Shapes: R rows, C columns, D dimension, B queries, M passages.
"""

# Kernel code is Python for Triton's compiler; its types are not Python's.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _log_sum(total, rise):
    """Return log(1 + total * exp(rise)) for float64 sums relative to a pivot `rise` above the positive's score."""
    x = total * tl.exp(tl.minimum(rise, 60.0))
    small = x * (1.0 - x * (0.5 - x * (1.0 / 3.0 - x * 0.25)))
    return tl.where(x < 1e-3, small, rise + tl.log(total + tl.exp(-rise)))


@triton.jit
def finish_kernel(
    blocks, positive_ptr, scale, weight, loss_ptr, coefficient_ptr, weights_ptr, R,
    SCALE_IN_MEMORY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the loss and coefficient of each row, and its weight for each block, with factor = scale * weight:

    loss = weight (log(Z) - positive)
    coefficient = -factor (1 - exp(positive) / Z)
    weight_b = factor exp(pivot_b) / Z

    blocks: a pair (sums, pivots) for each block of the softmax. In float64, which costs nothing here, so that a loss of
    1e-9 keeps its digits as one of 200 does.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    positive = tl.load(positive_ptr + i, mask=i < R, other=0.0).to(tl.float64)
    top = tl.load(blocks[0][1] + i, mask=i < R, other=0.0).to(tl.float64) - positive
    for b in tl.static_range(1, len(blocks)):
        top = tl.maximum(top, tl.load(blocks[b][1] + i, mask=i < R, other=0.0).to(tl.float64) - positive)
    total = tl.zeros((BLOCK,), tl.float64)
    for b in tl.static_range(len(blocks)):
        rise = tl.load(blocks[b][1] + i, mask=i < R, other=0.0).to(tl.float64) - positive
        total += tl.load(blocks[b][0] + i, mask=i < R, other=0.0).to(tl.float64) * tl.exp(rise - top)
    if SCALE_IN_MEMORY:
        scale = tl.load(scale)
    share = (scale * weight) / (total + tl.exp(-top))
    tl.store(loss_ptr + i, (weight * _log_sum(total, top)).to(tl.float32), mask=i < R)
    tl.store(coefficient_ptr + i, (-share * total).to(tl.float32), mask=i < R)
    for b in tl.static_range(len(blocks)):
        rise = tl.load(blocks[b][1] + i, mask=i < R, other=0.0).to(tl.float64) - positive
        tl.store(weights_ptr + b * R + i, (share * tl.exp(rise - top)).to(tl.float32), mask=i < R)


@triton.jit
def weigh_kernel(
    product_ptr, d_rows_ptr, rows_ptr, weighted_ptr, weight_ptr,
    R, D, product_stride, d_rows_stride, row_stride, weighted_stride,
    ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write d_rows_i (+)= weight_i * product_i (ROWS), and weighted^T_i = weight_i * rows_i (COLUMNS).

    d_rows and product may be one tensor.
    """
    dim_tiles = tl.cdiv(D, BD)
    i = (tl.program_id(0) // dim_tiles) * BM + tl.arange(0, BM)
    d = (tl.program_id(0) % dim_tiles) * BD + tl.arange(0, BD)
    row = i.to(tl.int64)[:, None]
    mask = (i < R)[:, None] & (d < D)[None, :]
    weight = tl.load(weight_ptr + i, mask=i < R, other=0.0)[:, None]
    if ROWS:
        value = weight * tl.load(product_ptr + row * product_stride + d[None, :], mask=mask)
        ptrs = d_rows_ptr + row * d_rows_stride + d[None, :]
        if ADD:
            value += tl.load(ptrs, mask=mask)
        tl.store(ptrs, value, mask=mask)
    if COLUMNS:
        value = weight * tl.load(rows_ptr + row * row_stride + d[None, :], mask=mask).to(tl.float32)
        ptrs = weighted_ptr + d.to(tl.int64)[None, :] * weighted_stride + i[:, None]
        tl.store(ptrs, value.to(weighted_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _close(
    tile, total_ptr, coefficient_ptr, other_ptr, factor, out_ptr, N, B, D, STRIDE, other_step, other_stride,
    BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    j = tile * BM + tl.arange(0, BM)
    i = j // STRIDE
    has_query = (j % STRIDE == 0) & (i < B)
    coefficient = tl.load(coefficient_ptr + i, mask=has_query, other=0.0)
    for first in range(0, D, BD):
        d = first + tl.arange(0, BD)
        mask = (j < N)[:, None] & (d < D)[None, :]
        at = j.to(tl.int64)[:, None] * D + d[None, :]
        other_ptrs = other_ptr + i.to(tl.int64)[:, None] * other_step * other_stride + d[None, :]
        other = tl.load(other_ptrs, mask=has_query[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        total = tl.load(total_ptr + at, mask=mask, other=0.0) + coefficient[:, None] * other
        tl.store(out_ptr + at, (factor * total).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def close_kernel(
    queries_ptr, passages_ptr, coefficient_ptr, factor_ptr, q_total_ptr, p_total_ptr, q_out_ptr, p_out_ptr,
    B, M, D, STRIDE, query_stride, passage_stride, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write q_out_i = factor * (q_total_i + coefficient_i * passages_(i * STRIDE)), and p_out likewise.

    One launch does both, the queries' tiles first: a small batch waits for launches.
    """
    factor = tl.load(factor_ptr)
    tile = tl.program_id(0)
    query_tiles = tl.cdiv(B, BM)
    if tile < query_tiles:
        _close(
            tile, q_total_ptr, coefficient_ptr, passages_ptr, factor, q_out_ptr,
            B, B, D, 1, STRIDE, passage_stride, BM, BD,
        )  # fmt: skip
    else:
        _close(
            tile - query_tiles, p_total_ptr, coefficient_ptr, queries_ptr, factor, p_out_ptr,
            M, B, D, STRIDE, 1, query_stride, BM, BD,
        )  # fmt: skip


@triton.jit
def _rivals(dot_ptr, ids_ptr, j, at, positive_id, C, IDS: tl.constexpr):
    """Return the products with columns j, -inf for the positive and, with IDS, for those of its id."""
    dot = tl.load(dot_ptr + j, mask=(j < C) & (j != at), other=float("-inf"))
    if IDS:
        same = tl.load(ids_ptr + j, mask=j < C, other=-1) == positive_id
        dot = tl.where(same & (positive_id != -1), float("-inf"), dot)
    return dot


@triton.jit
def dense_kernel(
    dot_ptr, out_ptr, loss_ptr, coefficient_ptr, ids_ptr, C, STRIDE, scale, factor,
    IDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For row i (positive at column i * STRIDE), write the loss, and factor * softmax into `out`, 0 at the positive.

    factor * (p_positive - 1) is written apart, in float32: rounded, it would break the cancellation.
    """
    i = tl.program_id(0)
    dot_ptr += i.to(tl.int64) * C
    out_ptr += i.to(tl.int64) * C
    at = i * STRIDE
    positive = tl.load(dot_ptr + at)
    positive_id = at
    if IDS:
        positive_id = tl.load(ids_ptr + at)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for first in range(0, C, BLOCK):
        j = first + tl.arange(0, BLOCK)
        best = tl.maximum(best, _rivals(dot_ptr, ids_ptr, j, at, positive_id, C, IDS))
    top = tl.maximum(tl.max(best, 0), positive)
    scale2 = scale * LOG2E
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, C, BLOCK):
        j = first + tl.arange(0, BLOCK)
        total += tl.exp2((_rivals(dot_ptr, ids_ptr, j, at, positive_id, C, IDS) - top) * scale2)
    rest = tl.sum(total, 0)
    share = factor / (rest + tl.exp2((positive - top) * scale2))
    for first in range(0, C, BLOCK):
        j = first + tl.arange(0, BLOCK)
        exp = tl.exp2((_rivals(dot_ptr, ids_ptr, j, at, positive_id, C, IDS) - top) * scale2)
        tl.store(out_ptr + j, (share * exp).to(out_ptr.dtype.element_ty), mask=j < C)
    tl.store(coefficient_ptr + i, -rest * share)
    rise = ((top - positive) * scale).to(tl.float64)
    tl.store(loss_ptr + i, _log_sum(rest.to(tl.float64), rise).to(tl.float32))
