"""Triton kernels of the fused path. Nothing here allocates, synchronises or orders sums by chance.

Shapes: r rows of one chunk, C columns, D dimension; a tile is BM rows by BN columns, BK of D at a time.
Scores live only in registers: `exp_kernel` multiplies a tile, exponentiates it against the row's pivot, writes it
in the dtype of the gradient products and leaves one partial sum a row and column tile. `settle_kernel` adds the
partial sums in a fixed order and does the rows over whose pivot was too low. Kernels over single rows: `row_kernels`.
"""

# Kernel code is Python for Triton's compiler; its types are not Python's.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import math

import triton
import triton.language as tl

from inbatch.losses.kernels import MAX_EXPONENT

LOG2E = tl.constexpr(1.4426950408889634)
# exp(MAX_EXPONENT) of `kernels`: below it no score was too far above its pivot.
MAX_SUM = tl.constexpr(math.exp(MAX_EXPONENT))


@triton.jit
def _place(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Return (row tile, column tile) of a tile, in groups of GROUP row tiles: tiles in flight share the L2 cache."""
    group_tiles = GROUP * column_tiles
    first = (tile // group_tiles) * GROUP
    group = min(row_tiles - first, GROUP)
    return first + (tile % group_tiles) % group, (tile % group_tiles) // group


@triton.jit
def _dot_tile(
    rows, columns, row0, column0, R, C, D, row_stride, column_stride,
    TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return rows[row0 : row0 + BM] @ columns[column0 : column0 + BN].T in float32; zeros beyond the ends."""
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
def positive_kernel(
    rows, positives, scale, score_ptr, row_scale_ptr, R, D, row_stride, positive_stride,
    SCALE_IN_MEMORY: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write row_scale_i = scale * exact / rounded and score_i = row_scale_i * rounded for rows_i . positives_i.

    exact is a float32 sum; rounded the diagonal of a product made as `exp_kernel` makes it. Tensor cores add towards
    zero (Fasi et al. 2021): over 1024 dimensions all products are about 1e-6 of themselves too small, 1e-4 nats at
    temperature 0.01. The ratio, measured on the positive, takes most of that back from the whole row.
    """
    row0 = tl.program_id(0) * BM
    dot = _dot_tile(rows, positives, row0, row0, R, R, D, row_stride, positive_stride, False, BM, BM, BK, PRECISION)
    local = tl.arange(0, BM)
    rounded = tl.sum(tl.where(local[:, None] == local[None, :], dot, 0.0), 1)
    i = row0 + local
    at = i.to(tl.int64)[:, None]
    sums = tl.zeros((BM, BD), tl.float32)
    sizes = tl.zeros((BM, BD), tl.float32)
    for first in range(0, D, BD):
        d = first + tl.arange(0, BD)[None, :]
        mask = (i < R)[:, None] & (d < D)
        row_tile = tl.load(rows + at * row_stride + d, mask=mask, other=0.0).to(tl.float32)
        term = row_tile * tl.load(positives + at * positive_stride + d, mask=mask, other=0.0).to(tl.float32)
        sums += term
        sizes += tl.abs(term)
    exact = tl.sum(sums, 1)
    # Where most terms cancel, the ratio is chance and says nothing about the row's other products.
    if SCALE_IN_MEMORY:
        scale = tl.load(scale)
    row_scale = scale * tl.where(tl.abs(exact) > 0.25 * tl.sum(sizes, 1), exact / rounded, 1.0)
    tl.store(row_scale_ptr + i, row_scale, mask=i < R)
    tl.store(score_ptr + i, rounded * row_scale, mask=i < R)


@triton.jit
def _fill_masked(values, dot, fill, scale, limit, keys, i, j, R, C, LIMIT: tl.constexpr):
    """Return `fill` where the pair is masked, by equal keys or by a score above the row's limit, else `values`.

    keys: a tuple of (row keys [r, K], column keys [C, L], K, L, row stride, column stride); -1 matches nothing.
    """
    for pair in tl.static_range(len(keys)):
        row_keys, column_keys, K, L, row_step, column_step = keys[pair]
        for k in range(K):
            row_key = tl.load(row_keys + i.to(tl.int64) * row_step + k, mask=i < R, other=-1)
            known = row_key != -1
            for m in range(L):
                column_key = tl.load(column_keys + j.to(tl.int64) * column_step + m, mask=j < C, other=-1)
                values = tl.where((row_key[:, None] == column_key[None, :]) & known[:, None], fill, values)
    if LIMIT:
        values = tl.where(dot * scale[:, None] > limit[:, None], fill, values)
    return values


@triton.jit
def _own(groups, i, j, R, C):
    """Return (the pair is of one group, left out by the row's rule, never masked by it); rules of `masking`.

    groups: (row groups [r], column groups [C], rules [r], factor within the group [r], factor outside [r]), or ().
    """
    column = tl.load(groups[1] + j, mask=j < C, other=-2)
    positive = (column & 1).to(tl.int32)
    rule = tl.load(groups[2] + i, mask=i < R, other=0)
    own = (tl.load(groups[0] + i, mask=i < R, other=1) >> 1)[:, None] == (column >> 1)[None, :]
    left_out = (((rule[:, None] >> positive[None, :]) & 1) != 0) & ~own
    return own, left_out, own & (positive == 0)[None, :] & ((rule & 4) != 0)[:, None]


@triton.jit
def _fill_left_out(values, unmasked, fill, groups, i, j, R, C):
    """Return `fill` where the row's rule leaves the pair out, `unmasked` where it forbids masks, else `values`."""
    if len(groups) > 0:
        _, left_out, kept = _own(groups, i, j, R, C)
        values = tl.where(left_out, fill, tl.where(kept, unmasked, values))
    return values


@triton.jit
def _scores(dot, scale, groups, i, j, R, C):
    """Return scale * dot, times the groups' factor."""
    scores = dot * scale[:, None]
    if len(groups) > 0:
        own, _, _ = _own(groups, i, j, R, C)
        within = tl.load(groups[3] + i, mask=i < R, other=1.0)
        outside = tl.load(groups[4] + i, mask=i < R, other=1.0)
        scores = scores * tl.where(own, within[:, None], outside[:, None])
    return scores


@triton.jit
def _in_base_2(pivot, scale):
    """Return the pivot in the units of dot * (scale * LOG2E), its rounding included: pivot * rounded / scale.

    With the same relative error on both sides, the error of the difference is relative to it, not to the score.
    """
    rounded = scale * LOG2E
    missing = tl.fma(scale, LOG2E, -rounded) / scale  # so that rounded / scale = LOG2E - missing
    return tl.fma(pivot, LOG2E, -pivot * missing)


@triton.jit
def _exp_piece(
    dot, scale, pivot, positive, limit, keys, groups, i, j, R, C, bare, LIMIT: tl.constexpr, COUNT: tl.constexpr
):  # fmt: skip
    """Return E = exp(score - pivot), 0 at the positive, masked and missing columns, and the counts of `_count_piece`.

    pivot: from `_in_base_2` if there are no groups. bare: none of these columns is missing or a row's positive.
    """
    if len(groups) > 0:
        exp = tl.exp2((_scores(dot, scale, groups, i, j, R, C) - pivot[:, None]) * LOG2E)
    else:
        exp = tl.exp2(dot * (scale * LOG2E)[:, None] - pivot[:, None])
    unmasked = exp
    fill: tl.constexpr = -1.0 if COUNT else 0.0
    if len(keys) > 0 or LIMIT:
        exp = _fill_masked(exp, dot, fill, scale, limit, keys, i, j, R, C, LIMIT)
    exp = _fill_left_out(exp, unmasked, fill, groups, i, j, R, C)
    return _count_piece(exp, positive, j, C, bare, len(keys) > 0 or len(groups) > 0 or LIMIT, COUNT)


@triton.jit
def _count_piece(exp, positive, j, C, bare, MASKS: tl.constexpr, COUNT: tl.constexpr):
    """Zero E at the positive and beyond the last column.

    With COUNT, masked entries arrive as -1 and leave as 0, and the second result packs two counts for each row:
    unmasked columns above the pivot + 2**16 * masked columns.
    """
    if not bare:
        exp = tl.where((j[None, :] == positive[:, None]) | (j >= C)[None, :], 0.0, exp)
    seen = positive  # not used
    if COUNT:
        packed = (exp > 1.0).to(tl.int32)
        if MASKS:  # -1 marked them, so that counting needs no second tile of flags
            packed += (exp < 0.0).to(tl.int32) << 16
            exp = tl.where(exp < 0.0, 0.0, exp)
        seen = tl.sum(packed, 1)
    return exp, seen


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
    rows, columns, exp, positive_ptr, pivot_ptr, scale_ptr, limit_ptr, partial_ptr, counts,
    keys, groups, R, C, D, row_stride, column_stride, exp_stride,
    LIMIT: tl.constexpr, COUNT: tl.constexpr, KEEP: tl.constexpr, TMA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, HALVES: tl.constexpr, GROUP: tl.constexpr,
    FLATTEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write E and its partial row sums, with one persistent program for each multiprocessor.

    partial_ptr [column tiles, r] float32. HALVES = 2 treats the tile's epilogue in two halves.
    """
    row_tiles = tl.cdiv(R, BM)
    column_tiles = tl.cdiv(C, BN)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=FLATTEN):
        row_tile, column_tile = _place(tile, row_tiles, column_tiles, GROUP)
        row0 = row_tile * BM
        column0 = column_tile * BN

        # Before the products, so that nothing waits for these loads after them.
        i = row0 + tl.arange(0, BM)
        scale = tl.load(scale_ptr + i, mask=i < R, other=1.0)
        pivot2 = tl.load(pivot_ptr + i, mask=i < R, other=0.0)
        if len(groups) == 0:
            pivot2 = _in_base_2(pivot2, scale)
        positive = tl.load(positive_ptr + i, mask=i < R, other=-1)
        limit = pivot2
        if LIMIT:
            limit = tl.load(limit_ptr + i, mask=i < R, other=float("inf"))
        inside = (positive >= column0) & (positive < column0 + BN)
        bare = (column0 + BN <= C) & (tl.max(inside.to(tl.int32), 0) == 0)

        dot = _dot_tile(rows, columns, row0, column0, R, C, D, row_stride, column_stride, TMA, BM, BN, BK, PRECISION)
        if HALVES == 1:
            j = column0 + tl.arange(0, BN)
            values, seen = _exp_piece(dot, scale, pivot2, positive, limit, keys, groups, i, j, R, C, bare, LIMIT, COUNT)
            if KEEP:
                _store_tile(exp, values, row0, column0, R, C, exp_stride, TMA, BM, BN)
            total = tl.sum(values, 1)
        else:
            half: tl.constexpr = BN // 2
            left, right = tl.split(tl.permute(tl.reshape(dot, (BM, 2, half)), (0, 2, 1)))
            j = column0 + tl.arange(0, half)
            values, seen = _exp_piece(
                left, scale, pivot2, positive, limit, keys, groups, i, j, R, C, bare, LIMIT, COUNT
            )
            if KEEP:
                _store_tile(exp, values, row0, column0, R, C, exp_stride, TMA, BM, half)
            total = tl.sum(values, 1)
            values, more = _exp_piece(
                right, scale, pivot2, positive, limit, keys, groups, i, j + half, R, C, bare, LIMIT, COUNT
            )
            seen += more
            if KEEP:
                _store_tile(exp, values, row0, column0 + half, R, C, exp_stride, TMA, BM, half)
            total += tl.sum(values, 1)
        tl.store(partial_ptr + column_tile.to(tl.int64) * R + i, total, mask=i < R)
        if COUNT:  # whole numbers: the order of these additions changes nothing
            tl.atomic_add(counts + i * 2, seen >> 16, mask=i < R)
            tl.atomic_add(counts + i * 2 + 1, seen & 0xFFFF, mask=i < R)


@triton.jit
def settle_kernel(
    rows, columns, exp, positive_ptr, pivot_ptr, scale_ptr, limit_ptr, partial_ptr, sum_ptr, pivot_out_ptr,
    keys, groups, R, C, D, TILES, row_stride, column_stride, exp_stride,
    LIMIT: tl.constexpr, KEEP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add up the partial sums of each row; redo rows whose scores exceed their pivot too far with their maximum.

    One program for BM rows. Each program decides whether the second part runs, so the host never waits.
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
        scale = tl.load(scale_ptr + i, mask=i < R, other=1.0)
        positive = tl.load(positive_ptr + i, mask=i < R, other=-1)
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
            unmasked = _scores(dot, scale, groups, i, j, R, C)
            score = _fill_masked(unmasked, dot, float("-inf"), scale, limit, keys, i, j, R, C, LIMIT)
            score = _fill_left_out(score, unmasked, float("-inf"), groups, i, j, R, C)
            score = tl.where((j[None, :] == positive[:, None]) | (j >= C)[None, :], float("-inf"), score)
            best = tl.maximum(best, tl.max(score, 1))
        pivot = tl.where(again, best, pivot)
        pivot2 = pivot if len(groups) > 0 else _in_base_2(pivot, scale)
        fresh = tl.zeros((BM,), tl.float32)
        for column0 in range(0, C, BN):
            j = column0 + tl.arange(0, BN)
            dot = _dot_tile(
                rows, columns, row0, column0, R, C, D, row_stride, column_stride, False, BM, BN, BK, PRECISION
            )
            values, _ = _exp_piece(dot, scale, pivot2, positive, limit, keys, groups, i, j, R, C, False, LIMIT, False)
            fresh += tl.sum(values, 1)
            if KEEP:
                ptrs = exp + i.to(tl.int64)[:, None] * exp_stride + j[None, :]
                tl.store(ptrs, values.to(exp.dtype.element_ty), mask=again[:, None] & (j < C)[None, :])
        total = tl.where(again, fresh, total)
    tl.store(sum_ptr + i, total, mask=i < R)
    tl.store(pivot_out_ptr + i, pivot, mask=i < R)
