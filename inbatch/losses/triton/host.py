"""The functions of `kernels` in Triton, for CUDA: float32 scores that never leave the registers.

Shapes: R rows of a chunk, C columns, D dimension.

One kernel multiplies a tile of scores, exponentiates it against the row's pivot and writes it in the dtype of the
gradient products, which are plain matrix products. That dtype is bfloat16 for half-precision inputs, float16 included:
exp(score - pivot) needs its range. Sums are added in a fixed order: results repeat bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from inbatch.losses import tiled
from inbatch.losses.kernels import Block
from inbatch.losses.triton.launch import INTERPRETED, launch

kernels: Any = None
row_kernels: Any = None
TensorDescriptor: Any = None
try:
    from triton.tools.tensor_descriptor import TensorDescriptor

    from inbatch.losses.triton import row_kernels
    from inbatch.losses.triton import tile_kernels as kernels
except ImportError:  # triton, or the device-independent descriptors of triton 3.4 (torch 2.8)
    pass
hopper: Any = None
with suppress(ImportError):  # another Gluon than it was written for
    from inbatch.losses.triton import hopper

# (MiB, rows at most), the most rows of these. Every chunk reads and writes the float32 gradient of all columns once, so
# few rows against many columns wait for memory.
DEFAULT_CHUNKS: tuple[tuple[float, float], ...] = ((1024.0, math.inf), (2048.0, 4096), (math.inf, 2048))
ROW_MULTIPLE: int = 128


@dataclass(frozen=True, kw_only=True)
class Tile:
    """BM x BN scores, BK of D at a time, over a ring of `stages` buffers; groups of row tiles share the L2 cache."""

    BM: int
    BN: int
    BK: int
    HALVES: int
    GROUP: int
    FLATTEN: bool
    num_warps: int
    num_stages: int


HALF_TILE = Tile(BM=128, BN=256, BK=64, HALVES=2, GROUP=8, FLATTEN=True, num_warps=8, num_stages=4)
FLOAT_TILE = Tile(BM=128, BN=128, BK=32, HALVES=1, GROUP=8, FLATTEN=False, num_warps=8, num_stages=3)
# Plain loads: other devices, and rows that are not multiples of 16 bytes.
POINTER_TILE = Tile(BM=64, BN=128, BK=32, HALVES=1, GROUP=8, FLATTEN=False, num_warps=4, num_stages=3)
INTERPRETED_TILE = Tile(BM=32, BN=64, BK=16, HALVES=2, GROUP=2, FLATTEN=False, num_warps=4, num_stages=1)
_SETTLE_TILE = {"BM": 32, "BN": 64, "BK": 32, "BT": 64}


def why_not(queries: Tensor) -> str | None:
    """Return why these kernels cannot take such inputs, in words; None if they can."""
    if kernels is None:
        return "triton 3.4 or later is not installed"
    if queries.dtype == torch.float64:
        return "it computes in float32, the inputs are float64"
    if not queries.is_cuda and not INTERPRETED:
        return f"it needs CUDA, the inputs are on {queries.device}"
    if queries.ndim == 3 and queries.shape[2] > 256:
        return f"several vectors a text may have up to 256 dimensions, the inputs have {queries.shape[2]}"
    return None


def exp_itemsize(dtype: torch.dtype) -> int:
    return dtype.itemsize


# ---- plans: decisions that hold for all calls of one kind, made once by the host


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Hold how `exp_scores` runs for inputs of one kind."""

    exp_dtype: torch.dtype
    tile: Tile
    multiprocessors: int
    hopper: bool
    masks: dict[str, bool]
    constants: dict[str, Any]
    options: dict[str, int]
    settle_constants: dict[str, Any]


@lru_cache(maxsize=256)
def _plan(dtype: torch.dtype, device: torch.device, bulk: bool, limit: bool, count: bool, keep: bool) -> Plan:
    multiprocessors, _, is_hopper = _device_facts(device)
    if INTERPRETED:
        tile = INTERPRETED_TILE
    elif not bulk:
        tile = POINTER_TILE
    else:
        tile = FLOAT_TILE if dtype == torch.float32 else HALF_TILE
    masks = {"LIMIT": limit, "COUNT": count, "KEEP": keep}
    names = ("BM", "BN", "BK", "HALVES", "GROUP", "FLATTEN")
    precision = {"PRECISION": _PRECISION[dtype]}
    return Plan(
        exp_dtype=torch.float32 if dtype == torch.float32 else torch.bfloat16,
        tile=tile,
        multiprocessors=multiprocessors,
        hopper=tile is HALF_TILE and is_hopper and hopper is not None and hopper.PROVEN,
        masks=masks,
        constants=masks | {"TMA": bulk} | {name: getattr(tile, name) for name in names} | precision,
        options={"num_warps": tile.num_warps, "num_stages": tile.num_stages},
        settle_constants={"LIMIT": limit, "KEEP": keep, **_SETTLE_TILE} | precision,
    )


# How products of a dtype are made. Half precision is exact either way.
_PRECISION = {torch.float32: "tf32x3", torch.bfloat16: "tf32", torch.float16: "tf32"}


@lru_cache(maxsize=16)
def _device_facts(device: torch.device) -> tuple[int, bool, bool]:
    """Return the multiprocessors; True if the large tiles run: bulk copies, 227 KiB shared memory; True for Hopper."""
    if device.type != "cuda":
        return 2, True, False
    properties = torch.cuda.get_device_properties(device)
    large = properties.major >= 9 and properties.shared_memory_per_block_optin >= 232448
    return properties.multi_processor_count, large, large and properties.major == 9


def _bulk_copies(rows: Tensor, columns: Tensor) -> bool:
    """Return True if tensor descriptors can read both."""
    aligned = (rows.data_ptr() | columns.data_ptr()) % 16 == 0
    strides = (rows.stride(0) | columns.stride(0)) * rows.itemsize % 16 == 0
    return aligned and strides and rows.stride(1) == columns.stride(1) == 1 and _device_facts(rows.device)[1]


def _descriptors(rows: Tensor, columns: Tensor, exp: Tensor, tile: Tile) -> tuple[Any, Any, Any]:
    C, D = columns.shape
    return (
        TensorDescriptor(rows, list(rows.shape), [rows.stride(0), 1], [tile.BM, tile.BK]),
        TensorDescriptor(columns, [C, D], [columns.stride(0), 1], [tile.BN, tile.BK]),
        TensorDescriptor(exp, [exp.shape[0], C], [exp.stride(0), 1], [tile.BM, tile.BN // tile.HALVES]),
    )


# ---- the functions of the interface


def exp_scores(block: Block, pivot_R: Tensor, *, keep: bool = True) -> tuple[Tensor | None, Tensor, Tensor]:
    rows, columns, limit, counts, device = block.rows, block.columns, block.limit, block.counts, block.rows.device
    (R, D), C = rows.shape, columns.shape[0]
    bulk = _bulk_copies(rows, columns)
    plan = _plan(rows.dtype, device, bulk, limit is not None, counts is not None, keep)
    # Rows of E start on 128 bytes: the copy engine needs 16, the products are fastest so.
    stride = -(-C // 64) * 64
    exp = torch.empty((R, stride) if keep else (1, stride), dtype=plan.exp_dtype, device=device)
    if R == 0 or C == 0:
        return (exp[:, :C] if keep else None), torch.zeros(R, dtype=torch.float32, device=device), pivot_R
    column_tiles = -(-C // plan.tile.BN)
    buffer = torch.empty((column_tiles + 2, R), dtype=torch.float32, device=device)
    partial, sum_R, new_pivot_R = buffer[:column_tiles], buffer[column_tiles], buffer[column_tiles + 1]
    vectors = block.positive, pivot_R, block.scale, pivot_R if limit is None else limit, partial
    strides = rows.stride(0), columns.stride(0), stride
    keys = tuple((r, c, r.shape[1], c.shape[1], r.stride(0), c.stride(0)) for r, c in block.keys)
    grid = min(-(-R // plan.tile.BM) * column_tiles, plan.multiprocessors)
    groups = ()
    if (of := block.groups) is not None:
        groups = tuple(part.contiguous() for part in (of.rows, of.columns, of.rules, of.own, of.others))
    counted = block.positive if counts is None else counts
    if plan.hopper and not groups:
        hopper.launch_exp(grid, rows, columns, exp, (*vectors, counted, keys, R, C, D), plan.masks)
    else:
        common = *vectors, counted, keys, groups, R, C, D
        operands = _descriptors(rows, columns, exp, plan.tile) if bulk else (rows, columns, exp)
        launch(kernels.exp_kernel, grid, (*operands, *common, *strides), plan.constants, **plan.options)
    arguments = (rows, columns, exp, *vectors, sum_R, new_pivot_R, keys, groups, R, C, D, column_tiles, *strides)
    launch(kernels.settle_kernel, -(-R // _SETTLE_TILE["BM"]), arguments, plan.settle_constants)
    return (exp[:, :C] if keep else None), sum_R, new_pivot_R


def finish(
    sums: Sequence[Tensor], pivots: Sequence[Tensor], positive_R: Tensor, scale: Tensor | float, weight: float,
    loss_R: Tensor, coefficient_R: Tensor,
) -> list[Tensor]:  # fmt: skip
    R = positive_R.shape[0]
    weights = torch.empty((len(sums), R), dtype=torch.float32, device=positive_R.device).unbind()
    if R:
        blocks = tuple(zip(sums, pivots, strict=True))
        # The weights of all blocks follow one another in memory.
        arguments = blocks, positive_R, scale, weight, loss_R, coefficient_R, weights[0], R
        constants = {"SCALE_IN_MEMORY": isinstance(scale, Tensor), "BLOCK": 256}
        launch(row_kernels.finish_kernel, -(-R // 256), arguments, constants)
    return list(weights)


def positive_scores(rows: Tensor, positives: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor]:
    R, D = rows.shape
    scores, row_scale = torch.empty((2, R), dtype=torch.float32, device=rows.device).unbind()
    if R:
        arguments = (rows, positives, scale, scores, row_scale, R, D, rows.stride(0), positives.stride(0))
        width = 32 if rows.dtype == torch.float32 else 128
        constants = {"BM": 64, "BK": width, "BD": 128, "PRECISION": _PRECISION[rows.dtype]}
        constants = {"SCALE_IN_MEMORY": isinstance(scale, Tensor)} | constants
        launch(kernels.positive_kernel, -(-R // 64), arguments, constants)
    return scores, row_scale


def add_gradients(block: Block, exp_RC: Tensor | None, weight_R: Tensor, *, rows: bool, columns: bool) -> None:
    assert exp_RC is not None
    dtype, (R, D), device = exp_RC.dtype, block.rows.shape, block.rows.device
    d_rows, d_columns = block.d_rows if rows else None, block.d_columns if columns else None
    if R == 0 or D == 0 or (d_rows is None and d_columns is None):
        return
    target = product = block.rows if d_rows is None else d_rows
    if d_rows is not None:
        if block.adds_to_rows:
            product = torch.empty((R, D), dtype=torch.float32, device=device)
        _product(exp_RC, block.columns.to(dtype), product, add=False)
    # With contiguous rows both operands of the product would be transposed, which costs it up to 5 %.
    stride = -(-R // 64) * 64
    weighted_Dr = weight_R if d_columns is None else torch.empty((D, stride), dtype=dtype, device=device)
    arguments = (
        product, target, block.rows, weighted_Dr, weight_R,
        R, D, product.stride(0), target.stride(0), block.rows.stride(0), stride,
    )  # fmt: skip
    masks = {"ADD": block.adds_to_rows, "ROWS": d_rows is not None, "COLUMNS": d_columns is not None}
    grid = -(-R // 64) * -(-D // 64)
    launch(row_kernels.weigh_kernel, grid, arguments, masks | {"BM": 64, "BD": 64})
    if d_columns is not None:
        _product(exp_RC.T, weighted_Dr[:, :R].T, d_columns, add=block.adds_to_columns)


def _product(left: Tensor, right: Tensor, out: Tensor, *, add: bool) -> None:
    """Write left @ right to `out`, or add it, in float32 throughout."""
    if left.dtype == out.dtype:
        out.addmm_(left, right, beta=1 if add else 0)
    elif add:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def close(
    queries: Tensor, passages: Tensor, positives: slice | Tensor, coefficient_B: Tensor,
    d_queries: Tensor | None, d_passages: Tensor | None, grad: Tensor, dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    (B, D), M = queries.shape, passages.shape[0]
    if d_queries is None or d_passages is None or isinstance(positives, Tensor) or positives.start or not (B and D):
        return tiled.close(queries, passages, positives, coefficient_B, d_queries, d_passages, grad, dtype)
    # One pass over the gradients of both.
    out = torch.empty_like(d_queries, dtype=dtype), torch.empty_like(d_passages, dtype=dtype)
    arguments = (
        queries, passages, coefficient_B, grad, d_queries, d_passages, *out,
        B, M, D, positives.step, queries.stride(0), passages.stride(0),
    )  # fmt: skip
    launch(row_kernels.close_kernel, -(-B // 8) + -(-M // 8), arguments, {"BM": 8, "BD": 512})
    return out
