"""Triton kernels of the fused path. Nothing here allocates, synchronises or orders sums by chance.

Shapes: r rows of one chunk, C columns, D dimension; a tile is BM rows by BN columns, BK of D at a time.
Scores live only in registers: `exp_kernel` multiplies a tile, exponentiates it against the row's pivot, writes it
in the dtype of the gradient products and leaves one partial sum a row and column tile. `settle_kernel` adds the
partial sums in a fixed order and does the rows over whose pivot was too low. The rest are small row kernels.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from inbatch.losses._blocks import MAX_EXPONENT

LOG2E = tl.constexpr(1.4426950408889634)
# exp(MAX_EXPONENT) of _blocks: below it no score was too far above its pivot.
MAX_SUM = tl.constexpr(math.exp(MAX_EXPONENT))


@triton.jit
def _dot_tile(
    rows, columns, row0, column0, R, C, D, row_stride, column_stride,
    TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """rows[row0 : row0 + BM] @ columns[column0 : column0 + BN].T in float32; zeros beyond the ends."""
    dot = tl.zeros((BM, BN), tl.float32)
    if TMA:
        for k in range(tl.cdiv(D, BK)):
            row_tile = rows.load([row0, k * BK])
            column_tile = columns.load([column0, k * BK])
            dot = tl.dot(row_tile, column_tile.T, dot, input_precision=PRECISION)
    else:
        i = row0 + tl.arange(0, BM)
        j = column0 + tl.arange(0, BN)
        row_ptrs = rows + i.to(tl.int64)[:, None] * row_stride
        column_ptrs = columns + j.to(tl.int64)[None, :] * column_stride
        for k in range(tl.cdiv(D, BK)):
            d = k * BK + tl.arange(0, BK)
            row_tile = tl.load(row_ptrs + d[None, :], mask=(i < R)[:, None] & (d < D)[None, :], other=0.0)
            column_tile = tl.load(column_ptrs + d[:, None], mask=(j < C)[None, :] & (d < D)[:, None], other=0.0)
            dot = tl.dot(row_tile, column_tile, dot, input_precision=PRECISION)
    return dot


@triton.jit
def _fill_masked(values, dot, fill, scale, limit, keys, i, j, R, C, LIMIT: tl.constexpr):
    """`fill` where the pair is masked: equal keys, or a score above the row's limit.

    keys: a tuple of (row keys [r, K], column keys [C, L], K, L).
    """
    for pair in tl.static_range(len(keys)):
        row_keys, column_keys, K, L = keys[pair]
        for k in range(K):
            row_key = tl.load(row_keys + i.to(tl.int64) * K + k, mask=i < R, other=-1)
            for m in range(L):
                column_key = tl.load(column_keys + j.to(tl.int64) * L + m, mask=j < C, other=-2)
                values = tl.where(row_key[:, None] == column_key[None, :], fill, values)
    if LIMIT:
        values = tl.where(dot * scale > limit[:, None], fill, values)
    return values


@triton.jit
def _exp_piece(
    dot, scale, pivot, own, limit, keys, i, j, R, C, bare, counts, LIMIT: tl.constexpr, COUNT: tl.constexpr
):  # fmt: skip
    """E = exp(scale * dot - pivot), 0 on own, masked and missing columns.

    bare: none of these columns is missing or a row's own.
    """
    # Subtract first, then change base: rounding stays relative to the difference, not to the score.
    exp = tl.exp2((dot * scale - pivot[:, None]) * LOG2E)
    masks: tl.constexpr = len(keys) > 0 or LIMIT
    if masks:  # -1 marks a masked pair, so that counting needs no second tile of flags
        exp = _fill_masked(exp, dot, -1.0 if COUNT else 0.0, scale, limit, keys, i, j, R, C, LIMIT)
    if not bare:
        exp = tl.where((j[None, :] == own[:, None]) | (j >= C)[None, :], 0.0, exp)
    if COUNT:  # whole numbers: the order of these additions changes nothing
        tl.atomic_add(counts + i * 2 + 1, tl.sum((exp > 1.0).to(tl.int32), 1), mask=i < R)
        if masks:
            tl.atomic_add(counts + i * 2, tl.sum((exp < 0.0).to(tl.int32), 1), mask=i < R)
            exp = tl.where(exp < 0.0, 0.0, exp)
    return exp


@triton.jit
def _store_tile(exp, values, row0, column0, R, C, exp_stride, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    if TMA:
        exp.store([row0, column0], values.to(exp.dtype))
    else:
        i = row0 + tl.arange(0, BM)
        j = column0 + tl.arange(0, BN)
        ptrs = exp + i.to(tl.int64)[:, None] * exp_stride + j[None, :]
        tl.store(ptrs, values.to(exp.dtype.element_ty), mask=(i < R)[:, None] & (j < C)[None, :])


@triton.jit
def exp_kernel(
    rows, columns, exp, own_ptr, pivot_ptr, scale_ptr, limit_ptr, partial_ptr, counts,
    keys, R, C, D, row_stride, column_stride, exp_stride,
    LIMIT: tl.constexpr, COUNT: tl.constexpr, KEEP: tl.constexpr, TMA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, HALVES: tl.constexpr, GROUP: tl.constexpr,
    FLATTEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """E and its partial row sums, one persistent program for each slot of the device.

    partial_ptr [column tiles, r] float32. Tiles are visited in groups of GROUP row tiles, so that the tiles in flight
    share their rows and columns through the L2 cache. HALVES = 2 treats the tile's epilogue in two halves.
    """
    row_tiles = tl.cdiv(R, BM)
    column_tiles = tl.cdiv(C, BN)
    group_tiles = GROUP * column_tiles
    scale = tl.load(scale_ptr)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=FLATTEN):
        first = (tile // group_tiles) * GROUP
        group = min(row_tiles - first, GROUP)
        row0 = (first + (tile % group_tiles) % group) * BM
        column_tile = (tile % group_tiles) // group
        column0 = column_tile * BN

        # Before the products, so that nothing waits for these loads after them.
        i = row0 + tl.arange(0, BM)
        pivot = tl.load(pivot_ptr + i, mask=i < R, other=0.0)
        own = tl.load(own_ptr + i, mask=i < R, other=-1)
        limit = pivot
        if LIMIT:
            limit = tl.load(limit_ptr + i, mask=i < R, other=float("inf"))
        inside = (own >= column0) & (own < column0 + BN)
        bare = (column0 + BN <= C) & (tl.max(inside.to(tl.int32), 0) == 0)

        dot = _dot_tile(rows, columns, row0, column0, R, C, D, row_stride, column_stride, TMA, BM, BN, BK, PRECISION)
        if HALVES == 1:
            j = column0 + tl.arange(0, BN)
            values = _exp_piece(dot, scale, pivot, own, limit, keys, i, j, R, C, bare, counts, LIMIT, COUNT)
            if KEEP:
                _store_tile(exp, values, row0, column0, R, C, exp_stride, TMA, BM, BN)
            total = tl.sum(values, 1)
        else:
            half: tl.constexpr = BN // 2
            left, right = tl.split(tl.permute(tl.reshape(dot, (BM, 2, half)), (0, 2, 1)))
            j = column0 + tl.arange(0, half)
            values = _exp_piece(left, scale, pivot, own, limit, keys, i, j, R, C, bare, counts, LIMIT, COUNT)
            if KEEP:
                _store_tile(exp, values, row0, column0, R, C, exp_stride, TMA, BM, half)
            total = tl.sum(values, 1)
            values = _exp_piece(right, scale, pivot, own, limit, keys, i, j + half, R, C, bare, counts, LIMIT, COUNT)
            if KEEP:
                _store_tile(exp, values, row0, column0 + half, R, C, exp_stride, TMA, BM, half)
            total += tl.sum(values, 1)
        tl.store(partial_ptr + column_tile.to(tl.int64) * R + i, total, mask=i < R)


@triton.jit
def settle_kernel(
    rows, columns, exp, own_ptr, pivot_ptr, scale_ptr, limit_ptr, partial_ptr, sum_ptr, pivot_out_ptr,
    keys, R, C, D, TILES, row_stride, column_stride, exp_stride,
    LIMIT: tl.constexpr, KEEP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Row sums from the partial sums; rows whose scores exceed their pivot too far are done over with their maximum.

    One program for BM rows. The second part runs only where some row needs it, which the program sees for itself:
    the host never waits.
    """
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    total = tl.zeros((BM,), tl.float32)
    for first in range(0, TILES, BT):
        tile = first + tl.arange(0, BT)
        ptrs = partial_ptr + tile.to(tl.int64)[:, None] * R + i[None, :]
        total += tl.sum(tl.load(ptrs, mask=(tile < TILES)[:, None] & (i < R)[None, :], other=0.0), 0)
    pivot = tl.load(pivot_ptr + i, mask=i < R, other=0.0)
    again = ~(total <= MAX_SUM) & (i < R)  # true for NaN as well
    if tl.max(again.to(tl.int32), 0) > 0:
        scale = tl.load(scale_ptr)
        own = tl.load(own_ptr + i, mask=i < R, other=-1)
        limit = pivot
        if LIMIT:
            limit = tl.load(limit_ptr + i, mask=i < R, other=float("inf"))
        row0 = tl.program_id(0) * BM
        best = tl.full((BM,), float("-inf"), tl.float32)
        for column0 in range(0, C, BN):
            j = column0 + tl.arange(0, BN)
            dot = _dot_tile(
                rows, columns, row0, column0, R, C, D, row_stride, column_stride, False, BM, BN, BK, PRECISION
            )
            score = _fill_masked(dot * scale, dot, float("-inf"), scale, limit, keys, i, j, R, C, LIMIT)
            score = tl.where((j[None, :] == own[:, None]) | (j >= C)[None, :], float("-inf"), score)
            best = tl.maximum(best, tl.max(score, 1))
        pivot = tl.where(again, best, pivot)
        fresh = tl.zeros((BM,), tl.float32)
        for column0 in range(0, C, BN):
            j = column0 + tl.arange(0, BN)
            dot = _dot_tile(
                rows, columns, row0, column0, R, C, D, row_stride, column_stride, False, BM, BN, BK, PRECISION
            )
            values = _exp_piece(dot, scale, pivot, own, limit, keys, i, j, R, C, False, sum_ptr, LIMIT, False)
            fresh += tl.sum(values, 1)
            if KEEP:
                ptrs = exp + i.to(tl.int64)[:, None] * exp_stride + j[None, :]
                tl.store(ptrs, values.to(exp.dtype.element_ty), mask=again[:, None] & (j < C)[None, :])
        total = tl.where(again, fresh, total)
    tl.store(sum_ptr + i, total, mask=i < R)
    tl.store(pivot_out_ptr + i, pivot, mask=i < R)


@triton.jit
def _log_sum(total, rise):
    """log(1 + total * exp(rise)) for float64 sums relative to a pivot that is `rise` above the positive's score."""
    x = total * tl.exp(tl.minimum(rise, 60.0))
    small = x * (1.0 - x * (0.5 - x * (1.0 / 3.0 - x * 0.25)))
    return tl.where(x < 1e-3, small, rise + tl.log(total + tl.exp(-rise)))


@triton.jit
def finish_kernel(
    sum_ptr, pivot_ptr, positive_ptr, factor_ptr, loss_ptr, weight_ptr, coefficient_ptr, R, BLOCK: tl.constexpr
):
    """loss = log(Z) - positive, weight = factor exp(pivot) / Z, coefficient = -factor (1 - exp(positive) / Z).

    In float64, which costs nothing here: a row's loss may be 1e-9 or 200 and keeps its digits either way.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(sum_ptr + i, mask=i < R, other=0.0).to(tl.float64)
    positive = tl.load(positive_ptr + i, mask=i < R, other=0.0).to(tl.float64)
    rise = tl.load(pivot_ptr + i, mask=i < R, other=0.0).to(tl.float64) - positive
    factor = tl.load(factor_ptr).to(tl.float64)
    z = total + tl.exp(-rise)
    tl.store(loss_ptr + i, _log_sum(total, rise).to(tl.float32), mask=i < R)
    tl.store(weight_ptr + i, (factor / z).to(tl.float32), mask=i < R)
    tl.store(coefficient_ptr + i, (-factor * (total / z)).to(tl.float32), mask=i < R)


@triton.jit
def row_dot_kernel(
    left_ptr, right_ptr, scale_ptr, out_ptr, R, D, left_stride, right_stride, BM: tl.constexpr, BD: tl.constexpr
):
    """out_i = scale * left_i . right_i in float32, without float32 copies of the inputs."""
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    total = tl.zeros((BM, BD), tl.float32)
    for first in range(0, D, BD):
        d = first + tl.arange(0, BD)
        mask = (i < R)[:, None] & (d < D)[None, :]
        left = tl.load(left_ptr + i.to(tl.int64)[:, None] * left_stride + d[None, :], mask=mask, other=0.0)
        right = tl.load(right_ptr + i.to(tl.int64)[:, None] * right_stride + d[None, :], mask=mask, other=0.0)
        total += left.to(tl.float32) * right.to(tl.float32)
    tl.store(out_ptr + i, tl.sum(total, 1) * tl.load(scale_ptr), mask=i < R)


@triton.jit
def _put(out, values, row0, column0, ADD: tl.constexpr, ENGINE: tl.constexpr):
    if ADD and ENGINE:  # by the copy engine: each element once a launch, so the order of additions is that of launches
        out.atomic_add([row0, column0], values)
    elif ADD:
        out.store([row0, column0], out.load([row0, column0]) + values)
    else:
        out.store([row0, column0], values)


@triton.jit
def product_kernel(
    exp, rows, out, R, C, D,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, ADD: tl.constexpr, FLATTEN: tl.constexpr,
    ENGINE: tl.constexpr,
):  # fmt: skip
    """out [C, D] float32 = exp [r, C].T @ rows [r, D], or += with ADD, tile by tile as `exp_kernel` goes."""
    row_tiles = tl.cdiv(C, BM)
    column_tiles = tl.cdiv(D, BN)
    group_tiles = GROUP * column_tiles
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=FLATTEN):
        first = (tile // group_tiles) * GROUP
        group = min(row_tiles - first, GROUP)
        row0 = (first + (tile % group_tiles) % group) * BM
        column0 = ((tile % group_tiles) // group) * BN
        total = tl.zeros((BM, BN), tl.float32)
        for k in range(tl.cdiv(R, BK)):
            total = tl.dot(exp.load([k * BK, row0]).T, rows.load([k * BK, column0]), total)
        # In quarters: a whole float32 tile would take the shared memory that the operands need.
        half: tl.constexpr = BN // 2
        quarter: tl.constexpr = BN // 4
        left, right = tl.split(tl.permute(tl.reshape(total, (BM, 2, half)), (0, 2, 1)))
        first_quarter, second_quarter = tl.split(tl.permute(tl.reshape(left, (BM, 2, quarter)), (0, 2, 1)))
        _put(out, first_quarter, row0, column0, ADD, ENGINE)
        _put(out, second_quarter, row0, column0 + quarter, ADD, ENGINE)
        third_quarter, fourth_quarter = tl.split(tl.permute(tl.reshape(right, (BM, 2, quarter)), (0, 2, 1)))
        _put(out, third_quarter, row0, column0 + half, ADD, ENGINE)
        _put(out, fourth_quarter, row0, column0 + half + quarter, ADD, ENGINE)


@triton.jit
def close_kernel(
    total_ptr, coefficient_ptr, other_ptr, factor_ptr, out_ptr, N, B, D, STRIDE, other_stride,
    BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out_j = factor * (total_j + coefficient_i * other_i) where j = i * STRIDE for an i < B, else factor * total_j."""
    j = tl.program_id(0) * BM + tl.arange(0, BM)
    i = j // STRIDE
    own = (j % STRIDE == 0) & (i < B)
    factor = tl.load(factor_ptr)
    coefficient = tl.load(coefficient_ptr + i, mask=own, other=0.0)
    for first in range(0, D, BD):
        d = first + tl.arange(0, BD)
        mask = (j < N)[:, None] & (d < D)[None, :]
        at = j.to(tl.int64)[:, None] * D + d[None, :]
        other_ptrs = other_ptr + i.to(tl.int64)[:, None] * other_stride + d[None, :]
        other = tl.load(other_ptrs, mask=own[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        total = tl.load(total_ptr + at, mask=mask, other=0.0) + coefficient[:, None] * other
        tl.store(out_ptr + at, (factor * total).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def dense_kernel(dot_ptr, out_ptr, loss_ptr, C, STRIDE, scale, factor, BLOCK: tl.constexpr):
    """One row of products: its loss and, in out, factor * (softmax - one at the own column i * STRIDE)."""
    i = tl.program_id(0)
    dot_ptr += i.to(tl.int64) * C
    out_ptr += i.to(tl.int64) * C
    own = i * STRIDE
    positive = tl.load(dot_ptr + own)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for first in range(0, C, BLOCK):
        j = first + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.load(dot_ptr + j, mask=j < C, other=float("-inf")))
    top = tl.max(best, 0)
    scale2 = scale * LOG2E
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, C, BLOCK):
        j = first + tl.arange(0, BLOCK)
        dot = tl.load(dot_ptr + j, mask=(j < C) & (j != own), other=float("-inf"))
        total += tl.exp2((dot - top) * scale2)
    rest = tl.sum(total, 0)
    z = rest + tl.exp2((positive - top) * scale2)
    for first in range(0, C, BLOCK):
        j = first + tl.arange(0, BLOCK)
        dot = tl.load(dot_ptr + j, mask=j < C, other=float("-inf"))
        share = tl.where(j == own, -rest, tl.exp2((dot - top) * scale2)) * (factor / z)
        tl.store(out_ptr + j, share.to(out_ptr.dtype.element_ty), mask=j < C)
    rise = ((top - positive) * scale).to(tl.float64)
    tl.store(loss_ptr + i, _log_sum(rest.to(tl.float64), rise).to(tl.float32))
