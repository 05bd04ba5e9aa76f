"""The kernel functions of `blocks` in Triton, for CUDA: float32 scores that never leave the registers.

Shapes: R rows, C columns, D dimension, r rows of one chunk.

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

from inbatch.losses.blocks import Block
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
DEFAULT_CHUNKS = ((1024.0, math.inf), (2048.0, 4096), (math.inf, 2048))
ROW_MULTIPLE = 128


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
    programs: int = 1  # resident on each multiprocessor

    def constants(self) -> dict[str, int | bool]:
        return {name: getattr(self, name) for name in ("BM", "BN", "BK", "HALVES", "GROUP", "FLATTEN")}


HALF_TILE = Tile(BM=128, BN=256, BK=64, HALVES=2, GROUP=8, FLATTEN=True, num_warps=8, num_stages=4)
FLOAT_TILE = Tile(BM=128, BN=128, BK=32, HALVES=1, GROUP=8, FLATTEN=False, num_warps=8, num_stages=3)
# Plain loads: other devices, and rows that are not multiples of 16 bytes.
POINTER_TILE = Tile(BM=64, BN=128, BK=32, HALVES=1, GROUP=8, FLATTEN=False, num_warps=4, num_stages=3)
INTERPRETED_TILE = Tile(BM=32, BN=32, BK=16, HALVES=2, GROUP=2, FLATTEN=False, num_warps=4, num_stages=1)
_SETTLE_TILE = {"BM": 32, "BN": 64, "BK": 32, "BT": 64}


def why_not(queries: Tensor) -> str | None:
    if kernels is None:
        return "triton 3.4 or later is not installed"
    if queries.dtype == torch.float64:
        return "it computes in float32, the inputs are float64"
    if not queries.is_cuda and not INTERPRETED:
        return f"it needs CUDA, the inputs are on {queries.device}"
    return None


def exp_itemsize(dtype: torch.dtype) -> int:
    return _exp_dtype(dtype).itemsize


def _exp_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def _precision(dtype: torch.dtype) -> str:
    """How products of this dtype are made. Half precision is exact either way."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def _pieces(size: int, piece: int) -> int:
    return -(-size // piece)


@lru_cache(maxsize=16)
def _device_facts(index: int) -> tuple[int, bool, bool]:
    """(multiprocessors, whether the large tiles run: a bulk copy engine and 227 KiB of shared memory, is it Hopper)"""
    properties = torch.cuda.get_device_properties(index)
    large = properties.major >= 9 and properties.shared_memory_per_block_optin >= 232448
    return properties.multi_processor_count, large, large and properties.major == 9


def _multiprocessors(tensor: Tensor) -> int:
    return _device_facts(tensor.device.index)[0] if tensor.is_cuda else 2


def _bulk_copies(*tensors: Tensor) -> bool:
    """Whether tensor descriptors can read all of these."""
    if tensors[0].is_cuda and not _device_facts(tensors[0].device.index)[1]:
        return False
    return all(
        tensor.stride(1) == 1 and tensor.stride(0) * tensor.itemsize % 16 == 0 and tensor.data_ptr() % 16 == 0
        for tensor in tensors
    )


def _pick_tile(dtype: torch.dtype, bulk: bool) -> Tile:
    if INTERPRETED:
        return INTERPRETED_TILE
    if not bulk:
        return POINTER_TILE
    return FLOAT_TILE if dtype == torch.float32 else HALF_TILE


def _descriptors(rows: Tensor, columns: Tensor, exp: Tensor, tile: Tile) -> tuple[Any, Any, Any]:
    C, D = columns.shape
    return (
        TensorDescriptor(rows, list(rows.shape), [rows.stride(0), 1], [tile.BM, tile.BK]),
        TensorDescriptor(columns, [C, D], [columns.stride(0), 1], [tile.BN, tile.BK]),
        TensorDescriptor(exp, [exp.shape[0], C], [exp.stride(0), 1], [tile.BM, tile.BN // tile.HALVES]),
    )


def _row_slices(block: Block, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple]:
    limit = None if block.limit is None else block.limit[start:stop]
    keys = tuple(
        (row_keys[start:stop], column_keys, row_keys.shape[1], column_keys.shape[1])
        for row_keys, column_keys in block.keys
    )
    return block.rows[start:stop], block.own[start:stop], block.scale[start:stop], limit, keys


def exp_scores(
    block: Block, start: int, stop: int, pivot_r: Tensor, *, keep: bool = True, counts: Tensor | None = None
) -> tuple[Tensor | None, Tensor, Tensor]:
    rows, own, scale, limit, keys = _row_slices(block, start, stop)
    (R, D), C = rows.shape, block.columns.shape[0]
    dtype, device = _exp_dtype(rows.dtype), rows.device
    # Rows of E start on 128 bytes: the copy engine needs 16, the products are fastest so.
    stride = -(-C // 64) * 64
    exp = torch.empty((R, stride) if keep else (1, stride), dtype=dtype, device=device)
    if R == 0 or C == 0:
        return (exp[:, :C] if keep else None), torch.zeros(R, dtype=torch.float32, device=device), pivot_r
    bulk = _bulk_copies(rows, block.columns)
    tile, precision = _pick_tile(rows.dtype, bulk), _precision(rows.dtype)
    tiles = _pieces(R, tile.BM), _pieces(C, tile.BN)
    partial = torch.empty((tiles[1], R), dtype=torch.float32, device=device)
    sums = torch.empty((2, R), dtype=torch.float32, device=device)  # and pivots
    vectors = own, pivot_r, scale, pivot_r if limit is None else limit, partial
    strides = rows.stride(0), block.columns.stride(0), stride
    grid = min(tiles[0] * tiles[1], _multiprocessors(rows) * tile.programs)
    common = *vectors, own if counts is None else counts[start:stop], keys, R, C, D
    masks = {"LIMIT": limit is not None, "COUNT": counts is not None, "KEEP": keep}
    if tile is HALF_TILE and hopper is not None and hopper.PROVEN and _device_facts(rows.device.index)[2]:
        hopper.launch_exp(grid, rows, block.columns, exp, common, masks)
    else:
        operands = _descriptors(rows, block.columns, exp, tile) if bulk else (rows, block.columns, exp)
        constants = masks | {"TMA": bulk} | tile.constants() | {"PRECISION": precision}
        warps = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        launch(kernels.exp_kernel, grid, (*operands, *common, *strides), constants, **warps)
    constants = {"LIMIT": limit is not None, "KEEP": keep, **_SETTLE_TILE, "PRECISION": precision}
    arguments = (rows, block.columns, exp, *vectors, sums[0], sums[1], keys, R, C, D, tiles[1], *strides)
    launch(kernels.settle_kernel, _pieces(R, _SETTLE_TILE["BM"]), arguments, constants)
    return (exp[:, :C] if keep else None), sums[0], sums[1]


def finish(
    sums: Sequence[Tensor], pivots: Sequence[Tensor], positive_r: Tensor, factor: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    R = positive_r.shape[0]
    loss, coefficient, *weights = torch.empty((2 + len(sums), R), dtype=torch.float32, device=positive_r.device)
    if R:
        blocks = tuple(zip(sums, pivots, strict=True))
        # The weights of all blocks lie one after the other.
        arguments = (blocks, positive_r, factor, loss, coefficient, weights[0], R)
        launch(row_kernels.finish_kernel, _pieces(R, 256), arguments, {"BLOCK": 256})
    return loss, weights, coefficient


def positive_scores(rows: Tensor, positives: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    R, D = rows.shape
    scores, row_scale = torch.empty((2, R), dtype=torch.float32, device=rows.device)
    if R:
        arguments = (rows, positives, scale, scores, row_scale, R, D, rows.stride(0), positives.stride(0))
        width = 32 if rows.dtype == torch.float32 else 128
        constants = {"BM": 64, "BK": width, "BD": 128, "PRECISION": _precision(rows.dtype)}
        launch(kernels.positive_kernel, _pieces(R, 64), arguments, constants)
    return scores, row_scale


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
    rows, dtype = block.rows[start:stop], exp_rC.dtype
    (R, D), device = rows.shape, rows.device
    if R == 0 or D == 0:
        return
    target = product = rows if d_rows is None else d_rows[start:stop]
    if d_rows is not None:
        if not fresh_rows:
            product = torch.empty((R, D), dtype=torch.float32, device=device)
        _product(exp_rC, block.columns.to(dtype), product, add=False)
    # With the rows contiguous, as exp_rC.T has the columns, both operands being transposed costs the product up to 5 %.
    stride = -(-R // 64) * 64
    weighted_Dr = weight_r if d_columns is None else torch.empty((D, stride), dtype=dtype, device=device)
    arguments = (
        product, target, rows, weighted_Dr, weight_r,
        R, D, product.stride(0), target.stride(0), rows.stride(0), stride,
    )  # fmt: skip
    masks = {"ADD": not fresh_rows, "ROWS": d_rows is not None, "COLUMNS": d_columns is not None}
    grid = _pieces(R, 64) * _pieces(D, 64)
    launch(row_kernels.weigh_kernel, grid, arguments, masks | {"BM": 64, "BD": 64})
    if d_columns is not None:
        _product(exp_rC.T, weighted_Dr[:, :R].T, d_columns, add=not fresh_columns)


def _product(left: Tensor, right: Tensor, out: Tensor, *, add: bool) -> None:
    """out = left @ right, or out += it, in float32 throughout."""
    if left.dtype == out.dtype:
        out.addmm_(left, right, beta=1 if add else 0)
    elif add:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def close(
    queries: Tensor,
    passages: Tensor,
    stride: int,
    coefficient_B: Tensor,
    d_queries: Tensor,
    d_passages: Tensor,
    factor: Tensor,
) -> tuple[Tensor, Tensor]:
    """factor * (the float32 gradients + the positive term), in the inputs' dtype: the last step, in one pass.

    Query i's positive is passage i * stride; coefficient_B is what its score's gradient is, in the units of the totals.
    """
    (B, D), M = queries.shape, passages.shape[0]
    out = (
        torch.empty((B, D), dtype=queries.dtype, device=queries.device),
        torch.empty_like(d_passages, dtype=queries.dtype),
    )
    grid = _pieces(B, 8) + _pieces(M, 8)
    if grid and D:
        arguments = (
            queries, passages, coefficient_B, factor, d_queries, d_passages, *out,
            B, M, D, stride, queries.stride(0), passages.stride(0),
        )  # fmt: skip
        launch(row_kernels.close_kernel, grid, arguments, {"BM": 8, "BD": 512})
    return out
