"""`exp_kernel` for Hopper, in Gluon: one half of the tile is exponentiated while the other multiplies.

Shapes: r rows of one chunk, C columns, D dimension; a tile is BM rows by BN columns, BK of D at a time.

Three groups of warps share a persistent program. One loads: a ring of STAGES buffers, each BK wide. Two compute, each
its own BM / 2 rows of every tile, from the same column buffers. The second starts a tile LEAD stages after the first,
so that the tensor cores always have one group's products to make while the other group exponentiates.
"""

# Kernel code is Python for Triton's compiler; its types are not Python's.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportAssignmentType=false

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from inbatch.losses.triton.launch import launch
from inbatch.losses.triton.tile_kernels import LOG2E, _count_piece, _fill_masked, _in_base_2, _place

# Gluon is experimental, and a mistake in such a kernel hangs or is silently wrong. The kernel compiles with these
# versions of triton. It is used with those on which a GPU gave, bit for bit, the result of the portable kernel.
_VERSION = tuple(int(number) for number in triton.__version__.split(".")[:2])
if not (3, 6) <= _VERSION <= (3, 9):
    raise ImportError(f"this kernel compiles with triton 3.6 to 3.9, not with {triton.__version__}")
PROVEN = _VERSION == (3, 6)

# BM and BN are those of `fused.HALF_TILE`, which the partial sums are laid out for.
TILE = {"BM": 128, "BN": 256, "BK": 64, "GROUP": 16, "STAGES": 4, "LEAD": 3}
_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
# Their names changed in triton 3.9.
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
async_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def _load(
    rows, columns, rows_smem, columns_smem, full, free, R, C, D,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    half: gl.constexpr = BM // 2
    row_tiles, column_tiles = gl.cdiv(R, BM), gl.cdiv(C, BN)
    stage = 0
    for tile in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row_tile, column_tile = _place(tile, row_tiles, column_tiles, GROUP)
        for k in range(0, D, BK):
            slot = stage % STAGES
            mbarrier.wait(free.index(slot), (stage // STAGES + 1) & 1)
            ready = full.index(slot)
            mbarrier.expect(ready, (BM + BN) * BK * 2)
            async_load(rows, [row_tile * BM, k], ready, rows_smem.index(2 * slot))
            async_load(rows, [row_tile * BM + half, k], ready, rows_smem.index(2 * slot + 1))
            async_load(columns, [column_tile * BN, k], ready, columns_smem.index(slot))
            stage += 1


@gluon.jit
def _halves(values, M: gl.constexpr, N: gl.constexpr):
    return gl.split(gl.permute(gl.reshape(values, (M, 2, N // 2)), (0, 2, 1)))


@gluon.jit
def _quarters(values, M: gl.constexpr, N: gl.constexpr):
    """Split by columns; no data moves between threads."""
    left, right = _halves(values, M, N)
    a, b = _halves(left, M, N // 2)
    c, d = _halves(right, M, N // 2)
    return a, b, c, d


@gluon.jit
def _first_keys(keys, i, j, R, C):
    """Return the first key of each row and of each column."""
    row_keys, column_keys, _K, _L, row_step, column_step = keys
    row_key = gl.load(row_keys + i.to(gl.int64) * row_step, mask=i < R, other=-1)
    return row_key, gl.load(column_keys + j.to(gl.int64) * column_step, mask=j < C, other=-1)


@gluon.jit
def _compute(
    exp, positive_ptr, pivot_ptr, scale_ptr, limit_ptr, partial_ptr, counts, keys,
    rows_smem, columns_smem, exp_smem, keys_smem, full, free, lead, R, C, D,
    SECOND: gl.constexpr, LIMIT: gl.constexpr, COUNT: gl.constexpr, KEEP: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    LEAD: gl.constexpr,
):  # fmt: skip
    half: gl.constexpr = BM // 2
    width: gl.constexpr = BN // 4
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    piece_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, piece_layout)
    column_layout: gl.constexpr = gl.SliceLayout(0, piece_layout)
    key_layout: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    masks: gl.constexpr = len(keys) > 0 or LIMIT
    buffers: gl.constexpr = 2 if len(keys) == 0 else 1
    fill: gl.constexpr = -1.0 if COUNT else 0.0
    row_tiles, column_tiles = gl.cdiv(R, BM), gl.cdiv(C, BN)
    steps = gl.cdiv(D, BK)
    stage = 0
    for tile in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row_tile, column_tile = _place(tile, row_tiles, column_tiles, GROUP)
        row0 = row_tile * BM + SECOND * half
        column0 = column_tile * BN
        i = row0 + gl.arange(0, half, layout=row_layout)
        # All that is wanted after the products is asked for before them, and looked at after them.
        scale = gl.load(scale_ptr + i, mask=i < R, other=1.0)
        pivot = gl.load(pivot_ptr + i, mask=i < R, other=0.0)
        positive = gl.load(positive_ptr + i, mask=i < R, other=-1)
        limit = pivot
        if LIMIT:
            limit = gl.load(limit_ptr + i, mask=i < R, other=float("inf"))
        row_key_0, row_key_1, column_key_0, column_key_1 = positive, positive, positive, positive
        key_j = column0 + gl.arange(0, BN, layout=key_layout)
        if len(keys) > 0:
            row_key_0, column_key_0 = _first_keys(keys[0], i, key_j, R, C)
        if len(keys) > 1:
            row_key_1, column_key_1 = _first_keys(keys[1], i, key_j, R, C)

        # With fewer steps than stages the first group could be two tiles ahead, where parities repeat.
        if SECOND:
            mbarrier.wait(lead, (stage // steps) & 1, pred=steps >= STAGES)
        dot = warpgroup_mma_init(gl.zeros((half, BN), gl.float32, layout=layout))
        for k in range(steps):
            slot = stage % STAGES
            mbarrier.wait(full.index(slot), (stage // STAGES) & 1)
            row_tile_smem = rows_smem.index(2 * slot + SECOND)
            dot = warpgroup_mma(row_tile_smem, columns_smem.index(slot).permute((1, 0)), dot, is_async=True)
            # The step before is over once at most this one is under way.
            dot = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(dot,)))
            if k > 0:
                mbarrier.arrive(free.index((stage - 1) % STAGES))
            if not SECOND:
                mbarrier.arrive(lead, pred=(k == LEAD) & (steps >= STAGES))
            stage += 1
        dot = warpgroup_mma_wait(0, deps=(dot,))
        mbarrier.arrive(free.index((stage - 1) % STAGES))

        pivot2 = _in_base_2(pivot, scale)
        inside = (positive >= column0) & (positive < column0 + BN)
        bare = (column0 + BN <= C) & (gl.max(inside.to(gl.int32), 0) == 0)
        if len(keys) > 0:
            keys_smem.index(len(keys) * SECOND).store(column_key_0)
        if len(keys) > 1:
            keys_smem.index(len(keys) * SECOND + 1).store(column_key_1)

        pieces = _quarters(dot, half, BN)
        total = gl.zeros_like(pivot2)
        seen = gl.zeros_like(positive)
        for piece in gl.static_range(4):
            part = gl.convert_layout(pieces[piece], piece_layout, assert_trivial=True)
            j = column0 + piece * width + gl.arange(0, width, layout=column_layout)
            values = gl.exp2(part * (scale * LOG2E)[:, None] - pivot2[:, None])
            for pair in gl.static_range(len(keys)):
                column_keys = keys_smem.index(len(keys) * SECOND + pair).slice(piece * width, width).load(column_layout)
                row_keys = row_key_0 if pair == 0 else row_key_1
                values = gl.where((row_keys[:, None] == column_keys[None, :]) & (row_keys != -1)[:, None], fill, values)
                if keys[pair][2] * keys[pair][3] > 1:  # several keys a row or column: the others as they come
                    values = _fill_masked(values, part, fill, scale, limit, (keys[pair],), i, j, R, C, False)
            if LIMIT:
                values = gl.where(part * scale[:, None] > limit[:, None], fill, values)
            values, more = _count_piece(values, positive, j, C, bare, masks, COUNT)
            if KEEP:
                buffer = exp_smem.index(buffers * SECOND + piece % buffers)
                tma.store_wait(buffers - 1)  # the last store from this buffer has read it
                buffer.store(values.to(exp.dtype))
                fence_async_shared()
                async_store(exp, [row0, column0 + piece * width], buffer)
            total += gl.sum(values, 1)
            if COUNT:
                seen += more
        gl.store(partial_ptr + column_tile.to(gl.int64) * R + i, total, mask=i < R)
        if COUNT:
            gl.atomic_add(counts + i * 2, seen >> 16, mask=i < R)
            gl.atomic_add(counts + i * 2 + 1, seen & 0xFFFF, mask=i < R)
    if KEEP:
        tma.store_wait(0)


@gluon.jit
def exp_kernel(
    rows, columns, exp, positive_ptr, pivot_ptr, scale_ptr, limit_ptr, partial_ptr, counts, keys, R, C, D,
    LIMIT: gl.constexpr, COUNT: gl.constexpr, KEEP: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    LEAD: gl.constexpr,
):  # fmt: skip
    """Write E and its partial row sums, as in `tile_kernels`, for half-precision rows and columns in descriptors."""
    half: gl.constexpr = BM // 2
    rows_smem = gl.allocate_shared_memory(rows.dtype, [2 * STAGES, half, BK], rows.layout)
    columns_smem = gl.allocate_shared_memory(columns.dtype, [STAGES, BN, BK], columns.layout)
    # Two buffers for each computing group, one where keys need the room.
    buffers: gl.constexpr = 4 if len(keys) == 0 else 2
    exp_smem = gl.allocate_shared_memory(exp.dtype, [buffers, half, BN // 4], exp.layout)
    keys_smem = gl.allocate_shared_memory(gl.int64, [max(2 * len(keys), 1), BN], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    lead = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(free.index(slot), count=2)
    mbarrier.init(lead, count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _compute,
                (
                    exp, positive_ptr, pivot_ptr, scale_ptr, limit_ptr, partial_ptr, counts, keys,
                    rows_smem, columns_smem, exp_smem, keys_smem, full, free, lead, R, C, D,
                    False, LIMIT, COUNT, KEEP, BM, BN, BK, GROUP, STAGES, LEAD,
                ),
            ),
            (
                _compute,
                (
                    exp, positive_ptr, pivot_ptr, scale_ptr, limit_ptr, partial_ptr, counts, keys,
                    rows_smem, columns_smem, exp_smem, keys_smem, full, free, lead, R, C, D,
                    True, LIMIT, COUNT, KEEP, BM, BN, BK, GROUP, STAGES, LEAD,
                ),
            ),
            (_load, (rows, columns, rows_smem, columns_smem, full, free, R, C, D, BM, BN, BK, GROUP, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def launch_exp(grid: int, rows: Tensor, columns: Tensor, exp: Tensor, arguments: tuple, masks: dict[str, bool]) -> None:
    """Launch `exp_kernel` for half-precision rows [R, D] and columns [C, D]; exp: [R, >= C], one row if not kept."""
    C, D = columns.shape
    operands = (
        TensorDescriptor(rows, list(rows.shape), [rows.stride(0), 1], [TILE["BM"] // 2, TILE["BK"]], _LAYOUT),
        TensorDescriptor(columns, [C, D], [columns.stride(0), 1], [TILE["BN"], TILE["BK"]], _LAYOUT),
        TensorDescriptor(exp, [exp.shape[0], C], [exp.stride(0), 1], [TILE["BM"] // 2, TILE["BN"] // 4], _LAYOUT),
    )
    launch(exp_kernel, grid, (*operands, *arguments), masks | TILE, num_warps=4)
