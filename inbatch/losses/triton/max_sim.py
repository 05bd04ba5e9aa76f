"""Late interaction in Triton: the grid of token pairs never leaves the registers, and no atomics add anything up.

Shapes: B queries of n tokens in all, packed; C passages, each where it starts in [m, D], the longest of T tokens.

Forward: a tile of query tokens meets one passage after the other, a block of its tokens at a time, and keeps the
maximum and its place. Backward: a query token gathers the passage tokens at its places. The places are sorted, block by
block, so that a passage token finds, in order, the query tokens that chose it. Results repeat bit for bit.
"""

# Kernel code is Python for Triton's compiler; its types are not Python's.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from inbatch.losses.triton.launch import launch

# By kernel, the first by dtype: BM query tokens meet BN passage tokens, GROUP passages a program; BC passages, BT or BK
# tokens at a time; BLOCK tokens are sorted together.
TILES = {
    "half": {"BM": 128, "BN": 64, "GROUP": 8, "num_warps": 4, "num_stages": 3},
    "float": {"BM": 64, "BN": 32, "GROUP": 8, "num_warps": 4, "num_stages": 2},
    "sum": {"BC": 32, "BT": 32, "num_warps": 4},
    "queries": {"BC": 16, "num_warps": 1},
    "order": {"BLOCK": 2048, "num_warps": 8},
    "passages": {"BK": 16, "num_warps": 1},
    "spans": {"BT": 256, "num_warps": 2},
}
_BEST_MIB = 64.0  # of maxima that wait for their sum


@triton.jit
def _rows(ptr, at, D: tl.constexpr, BD: tl.constexpr):
    """Load rows `at` [N] of a matrix of D columns, [N, BD]."""
    d = tl.arange(0, BD)
    ptrs = ptr + at[:, None] * D + d[None, :]
    if D == BD:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=(d < D)[None, :], other=0.0)


@triton.jit
def best_kernel(
    query_ptr, passage_ptr, start_ptr, length_ptr, best_ptr, place_ptr, n, C,
    D: tl.constexpr, BD: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write the maximum over each passage's tokens, and its place if KEEP: [C, n]."""
    tiles = tl.cdiv(n, BM)
    i = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    first = (tl.program_id(0) // tiles) * GROUP
    query = _rows(query_ptr, tl.minimum(i, n - 1), D, BD)
    at = first.to(tl.int64) * n + i
    for c in range(first, tl.minimum(first + GROUP, C)):
        passage = passage_ptr + tl.load(start_ptr + c) * D
        last = tl.load(length_ptr + c).to(tl.int32) - 1
        best = tl.full((BM,), -float("inf"), tl.float32)
        place = tl.zeros((BM,), tl.int32)
        for t in range(0, last + 1, BN):
            # Past the end comes the last token again, which does not win over itself.
            j = tl.minimum(t + tl.arange(0, BN), last)
            scores = tl.dot(query, tl.trans(_rows(passage, j, D, BD)), input_precision=PRECISION)
            highest = tl.max(scores, 1)
            better = (highest > best) | (highest != highest)
            if KEEP:
                lowest = tl.min(tl.where(scores == highest[:, None], j[None, :], last), 1)
                place = tl.where(better, lowest, place)
            best = tl.where(better, highest, best)
        tl.store(best_ptr + at, best, mask=i < n)
        if KEEP:
            tl.store(place_ptr + at, place.to(place_ptr.dtype.element_ty), mask=i < n)
        at += n


@triton.jit
def sum_kernel(best_ptr, start_ptr, length_ptr, score_ptr, n, C, stride, BC: tl.constexpr, BT: tl.constexpr):
    """Write the sums of the maxima [C, n] over the tokens of each query: [B, C]."""
    tiles = tl.cdiv(C, BC)
    text = tl.program_id(0) // tiles
    c = (tl.program_id(0) % tiles) * BC + tl.arange(0, BC)
    start, length = tl.load(start_ptr + text), tl.load(length_ptr + text).to(tl.int32)
    total = tl.zeros((BC,), tl.float32)
    for t in range(0, length, BT):
        x = t + tl.arange(0, BT)
        ptrs = best_ptr + c.to(tl.int64)[:, None] * n + (start + x)[None, :]
        total += tl.sum(tl.load(ptrs, mask=(c < C)[:, None] & (x < length)[None, :], other=0.0), 1)
    tl.store(score_ptr + text.to(tl.int64) * stride + c, total, mask=c < C)


@triton.jit
def query_gradient_kernel(
    passage_ptr, start_ptr, place_ptr, weight_ptr, text_ptr, out_ptr, n, C,
    D: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Add to a query token's gradient: the sum over passages of weight x the passage's token at its place."""
    i = tl.program_id(0)
    weights = weight_ptr + tl.load(text_ptr + i).to(tl.int64) * C
    total = tl.zeros((BD,), tl.float32)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        inside = c < C
        weight = tl.load(weights + c, mask=inside, other=0.0)
        place = tl.load(place_ptr + c.to(tl.int64) * n + i, mask=inside, other=0)
        start = tl.load(start_ptr + tl.minimum(c, C - 1))
        total += tl.sum(weight[:, None] * _rows(passage_ptr, start + place, D, BD).to(tl.float32), 0)
    d = tl.arange(0, BD)
    ptrs = out_ptr + i.to(tl.int64) * D + d
    tl.store(ptrs, tl.load(ptrs, mask=d < D, other=0.0) + total, mask=d < D)


@triton.jit
def order_kernel(place_ptr, key_ptr, end_ptr, n, blocks, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """Sort a block of a passage's query tokens by place, equal ones in order: keys place x BLOCK + token, [C, blocks,
    BLOCK]; write where each place ends in it, [C, blocks, BINS].

    BINS exceeds the places: what is past n goes to the last one.
    """
    k = tl.arange(0, BLOCK)
    i = (tl.program_id(0) % blocks) * BLOCK + k
    places = place_ptr + (tl.program_id(0) // blocks).to(tl.int64) * n
    place = tl.load(places + i, mask=i < n, other=BINS - 1).to(tl.int32)
    keys = key_ptr + tl.program_id(0).to(tl.int64) * BLOCK
    tl.store(keys + k, tl.sort(place * BLOCK + k))
    tl.debug_barrier()
    t = tl.arange(0, BINS)
    end = tl.zeros((BINS,), tl.int32)
    step = BLOCK
    while step > 0:  # how many keys are below the next place's: bit by bit
        more = end + step
        key = tl.load(keys + more - 1, mask=more <= BLOCK, other=2147483647)
        end = tl.where(key < (t + 1) * BLOCK, more, end)
        step = step // 2
    tl.store(end_ptr + tl.program_id(0).to(tl.int64) * BINS + t, end)


@triton.jit
def passage_gradient_kernel(
    query_ptr, start_ptr, length_ptr, end_ptr, key_ptr, weight_ptr, text_ptr, out_ptr, B, longest, blocks,
    D: tl.constexpr, BD: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write a passage token's gradient: the sum of weight x query token over those that chose it, in order."""
    c, t = tl.program_id(0) // longest, tl.program_id(0) % longest
    real = t < tl.load(length_ptr + c)
    weights = weight_ptr + c.to(tl.int64) * B
    total = tl.zeros((BD,), tl.float32)
    for block in range(blocks):
        at = c.to(tl.int64) * blocks + block
        ends, keys = end_ptr + at * BINS + t, key_ptr + at * BLOCK
        start, stop = tl.load(ends - 1, mask=real & (t > 0), other=0), tl.load(ends, mask=real, other=0)
        for first in range(start, stop, BK):
            k = first + tl.arange(0, BK)
            i = block * BLOCK + tl.load(keys + tl.minimum(k, stop - 1)) % BLOCK
            weight = tl.load(weights + tl.load(text_ptr + i), mask=k < stop, other=0.0)
            total += tl.sum(weight[:, None] * _rows(query_ptr, i.to(tl.int64), D, BD).to(tl.float32), 0)
    d = tl.arange(0, BD)
    ptrs = out_ptr + (tl.load(start_ptr + c) + t) * D + d
    tl.store(ptrs, total.to(out_ptr.dtype.element_ty), mask=d < tl.where(real, D, 0))


@triton.jit
def spans_kernel(mask_ptr, length_ptr, start_ptr, state_ptr, T, BT: tl.constexpr):
    """Write how many real tokens a text has and where its first one lies; note holes, and texts without any."""
    row = tl.program_id(0).to(tl.int64)
    length, first, last = tl.zeros((BT,), tl.int32), tl.zeros((BT,), tl.int32) + T, tl.zeros((BT,), tl.int32) - 1
    for start in range(0, T, BT):
        t = start + tl.arange(0, BT)
        real = tl.load(mask_ptr + row * T + t, mask=t < T, other=0) != 0
        length += real.to(tl.int32)
        first, last = tl.where(real, tl.minimum(first, t), first), tl.where(real, t, last)
    total, begin = tl.sum(length, 0), tl.min(first, 0)
    tl.store(length_ptr + row, total.to(tl.int64))
    tl.store(start_ptr + row, row * T + begin)
    tl.atomic_max(state_ptr, (tl.max(last, 0) - begin + 1 != total).to(tl.int64))
    tl.atomic_max(state_ptr + 1, tl.where(total == 0, row + 1, 0))


def spans(mask_RT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return lengths and starts [R], and, int64 [2], whether a text has holes, and 1 + a text without tokens or 0."""
    mask_RT = mask_RT.contiguous()
    rows, longest = mask_RT.shape
    lengths_and_starts = torch.empty(2, rows, dtype=torch.int64, device=mask_RT.device)
    state = torch.zeros(2, dtype=torch.int64, device=mask_RT.device)
    if rows:
        bytes_RT = mask_RT.view(torch.uint8) if mask_RT.dtype == torch.bool else mask_RT
        with torch.cuda.device(mask_RT.device) if mask_RT.is_cuda else nullcontext():
            _launch(spans_kernel, rows, (bytes_RT, *lengths_and_starts, state, longest), TILES["spans"])
    return *lengths_and_starts, state  # pyright: ignore[reportReturnType]


def _launch(kernel: Any, grid: int, arguments: tuple, constants: dict[str, Any]) -> None:
    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    constants = {name: value for name, value in constants.items() if name not in options}
    launch(kernel, grid, arguments, constants, **options)


class FusedGrid:
    """The queries' side, as `max_sim.Grid` is; its places are [C, n]."""

    dtype = torch.float32

    def __init__(self, queries_nD: Tensor, lengths_B: Tensor, mean: bool, chunk_mib: float | None, longest: int):
        D = queries_nD.shape[1]
        self.queries_nD, self.lengths_B = queries_nD.contiguous(), lengths_B.contiguous()
        self.factor_B1 = lengths_B.float().reciprocal()[:, None] if mean else None
        self.longest, self.best_mib = longest, _BEST_MIB if chunk_mib is None else chunk_mib
        self.width = {"D": D, "BD": max(16, triton.next_power_of_2(D))}
        self.tile = TILES["float" if queries_nD.dtype == torch.float32 else "half"]

    def scores(
        self, passages_mD: Tensor, lengths_C: Tensor, starts_C: Tensor, *, keep_places: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return the scores [B, C], and for each passage and query token the place of the maximum in it, int [C, n]."""
        n, B, C, device = len(self.queries_nD), len(self.lengths_B), len(lengths_C), passages_mD.device
        scores_BC, passages_mD = torch.empty(B, C, device=device), passages_mD.contiguous()
        if not n or not C:
            return scores_BC.zero_(), torch.empty(C, n, dtype=torch.int16, device=device)
        place_dtype = torch.int16 if self.longest < 2**15 else torch.int32
        places_Cn = torch.empty(C if keep_places else 0, n, dtype=place_dtype, device=device)
        chunk = max(1, int(self.best_mib * 2**18 / n))
        best_cn = torch.empty(min(chunk, C), n, device=device)
        precision = "tf32x3" if passages_mD.dtype == torch.float32 else "tf32"
        constants = self.width | {"KEEP": keep_places, "PRECISION": precision} | self.tile
        starts_B = self.lengths_B.cumsum(0) - self.lengths_B
        # Kernels run on the current device, not on that of their arguments.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            for first in range(0, C, chunk):
                some = slice(first, min(first + chunk, C))
                c, of_passages = some.stop - first, (passages_mD, starts_C[some], lengths_C[some])
                places = places_Cn[some] if keep_places else best_cn
                grid = triton.cdiv(n, self.tile["BM"]) * triton.cdiv(c, self.tile["GROUP"])
                _launch(best_kernel, grid, (self.queries_nD, *of_passages, best_cn, places, n, c), constants)
                of_texts = best_cn, starts_B, self.lengths_B, scores_BC[:, some]
                grid = B * triton.cdiv(c, TILES["sum"]["BC"])
                _launch(sum_kernel, grid, (*of_texts, n, c, C), TILES["sum"])
        return scores_BC if self.factor_B1 is None else scores_BC.mul_(self.factor_B1), places_Cn

    def add_gradients(
        self, d_scores_BC: Tensor, passages_mD: Tensor, lengths_C: Tensor, starts_C: Tensor, places_Cn: Tensor,
        d_queries_nD: Tensor, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """Add to the gradient of the query tokens, and return that of the passage tokens [m, D] in `dtype`."""
        n, B, C, device = len(self.queries_nD), *d_scores_BC.shape, passages_mD.device
        passages_mD = passages_mD.contiguous()
        d_passages_mD = torch.zeros_like(passages_mD, dtype=dtype)
        if not n or not C:
            return d_passages_mD
        weights_BC = (d_scores_BC if self.factor_B1 is None else d_scores_BC * self.factor_B1).contiguous()
        texts = torch.arange(B, dtype=torch.int32, device=device)
        text_n = torch.repeat_interleave(texts, self.lengths_B, output_size=n)
        arguments = (passages_mD, starts_C, places_Cn, weights_BC, text_n, d_queries_nD, n, C)
        _launch(query_gradient_kernel, n, arguments, self.width | TILES["queries"])

        bins = max(64, triton.next_power_of_2(self.longest + 1))
        block = min(TILES["order"]["BLOCK"], max(64, triton.next_power_of_2(n)))
        blocks, shared = triton.cdiv(n, block), {"BINS": bins, "BLOCK": block}
        keys_Cn = torch.empty(C, blocks * block, dtype=torch.int32, device=device)
        ends_Ct = torch.empty(C, blocks * bins, dtype=torch.int32, device=device)
        arguments = (places_Cn, keys_Cn, ends_Ct, n, blocks)
        _launch(order_kernel, C * blocks, arguments, TILES["order"] | shared)
        of_passages = starts_C, lengths_C, ends_Ct, keys_Cn, weights_BC.T.contiguous()
        arguments = (self.queries_nD, *of_passages, text_n, d_passages_mD, B, self.longest, blocks)
        _launch(passage_gradient_kernel, C * self.longest, arguments, self.width | shared | TILES["passages"])
        return d_passages_mD
