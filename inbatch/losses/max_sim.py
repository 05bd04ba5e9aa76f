"""Late interaction: scores of texts that are several vectors each.

Shapes: B queries, C passages, n query tokens, m passage tokens (packed: real ones alone, text after text), D dimension;
in a chunk c passages, T tokens of the longest, b queries, t tokens of theirs.

    s_ij = sum over tokens x of query i of  max over tokens y of passage j of  x . y

(Khattab and Zaharia 2020), or the mean over x. The grid of all token pairs is never held: a chunk of it is made, and
the places of its maxima are kept, 2 bytes for each query token and passage. Equal maxima: the first token counts. The
gradient goes through the places, chunk by chunk in a fixed order; nothing is added up by atomics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from inbatch import collectives
from inbatch.losses.ring import around
from inbatch.losses.softmax import refuse_second_derivatives

# The names of the masks -> (vectors [rows, T, D], mask [rows, T] or None), of queries and of passages.
Sides = Mapping[str, tuple[Tensor, Tensor | None]]
_CHUNK_MIB = {"cpu": 16.0, "cuda": 256.0}


@dataclass(frozen=True, slots=True)
class Tokens:
    """Texts of several vectors: `vectors` [n, D], and how many each has: `lengths` int64 [texts].

    Packed, text after text, or each text from `starts` [texts] on, with padding between them. `longest`: no text has
    more tokens, as far as it is known without reading lengths from a GPU.
    """

    vectors: Tensor
    lengths: Tensor
    starts: Tensor | None = None
    longest: int | None = None

    def most(self) -> int:
        if self.longest is None:
            return int(self.lengths.max()) if len(self.lengths) else 0
        return self.longest

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, rows: slice | Tensor) -> Tokens:
        """Return some of the texts, which are packed, in the order of `rows`."""
        lengths = self.lengths[rows].contiguous()
        first = (self.lengths.cumsum(0) - self.lengths)[rows]
        text_n = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        place_n = torch.arange(len(text_n), device=lengths.device) - (lengths.cumsum(0) - lengths)[text_n]
        return Tokens(self.vectors[(first[text_n] + place_n).to(self.vectors.device)], lengths, longest=self.longest)

    def prefix(self, dim: int) -> Tokens:
        """Return the texts with `prefix` of their vectors."""
        return replace(self, vectors=prefix(self.vectors, dim))


def prefix(vectors: Tensor, dim: int) -> Tensor:
    """Return the first `dim` dimensions, renormalised; the full dimension unchanged. Differentiable."""
    return vectors if dim == vectors.shape[1] else F.normalize(vectors[:, :dim], dim=1)


@dataclass(frozen=True, slots=True)
class Spans:
    """Hold the places of the real tokens of texts [rows, T]: `lengths` int64 [rows], and `starts` int64 [rows], the
    place of each text's first one among all rows x T.

    mask: not 0 where a token is real; None: all are. whole: none is missing between a text's first and last.
    """

    mask: Tensor | None
    lengths: Tensor
    starts: Tensor
    whole: bool


def read_spans(sides: Sides, *, fused: bool = False) -> tuple[list[Spans], str | None]:
    """Return the spans of each (vectors, mask), and, in words, a text without a real token, if there is one.

    Waits for a GPU once, if there are masks. fused: in one kernel for each.
    """
    if fused:
        from inbatch.losses.triton.max_sim import spans  # here, since it imports triton
    else:
        spans = _spans
    masks = [None if mask is None else mask.to(vectors.device) for vectors, mask in sides.values()]
    read = [None if mask is None else spans(mask) for mask in masks]
    states = [of_side[2] for of_side in read if of_side is not None]
    numbers = iter(torch.stack(states).tolist() if states else [])
    spans_of_sides, error = [], None
    for (name, (vectors, _)), mask, of_side in zip(sides.items(), masks, read, strict=True):
        rows, longest, _ = vectors.shape
        if of_side is None:
            lengths = torch.full((rows,), longest, device=vectors.device)
            spans_of_sides.append(Spans(None, lengths, torch.arange(rows, device=vectors.device) * longest, True))
            empty = int(rows > 0 and longest == 0)
        else:
            holes, empty = next(numbers)
            spans_of_sides.append(Spans(mask, *of_side[:2], not holes))
        if empty and error is None:
            error = f"{name}: text {empty - 1} of {rows} has no real token, so nothing has a maximum"
    return spans_of_sides, error


def _spans(mask_RT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return lengths and starts [R], and, int64 [2], how many texts have holes, and 1 + a text without tokens or 0."""
    real_RT, (rows, longest) = mask_RT != 0, mask_RT.shape
    lengths, place_T = real_RT.sum(1), torch.arange(longest, device=mask_RT.device)
    first = place_T.where(real_RT, longest).amin(1) if longest else lengths
    last = place_T.where(real_RT, -1).amax(1) if longest else lengths - 1
    number = torch.arange(1, rows + 1, device=mask_RT.device)
    empty = number.where(lengths == 0, 0).amax() if rows else lengths.sum()
    starts = torch.arange(rows, device=mask_RT.device) * longest + first
    return lengths, starts, torch.stack([(last - first + 1 != lengths).sum(), empty])


def packed(vectors: Tensor, spans: Spans) -> Tokens:
    """Return the real tokens of texts [rows, T, D], text after text."""
    flat, longest = vectors.flatten(0, 1), vectors.shape[1]
    if spans.mask is not None:  # rather than vectors[mask], whose backward pass sorts
        flat = flat.index_select(0, spans.mask.flatten().nonzero()[:, 0])
    return Tokens(flat, spans.lengths, longest=longest)


def in_place(vectors: Tensor, spans: Spans) -> Tokens:
    """Return the real tokens as `packed` does, but where they lie, if those of each text follow one another."""
    if spans.mask is None or not len(vectors) or not vectors.is_contiguous() or not spans.whole:
        return packed(vectors, spans)
    return Tokens(vectors.flatten(0, 1), spans.lengths, spans.starts, vectors.shape[1])


def max_sim(
    queries: Tokens, passages: Tokens, *, mean: bool = False, chunk_mib: float | None = None, fused: bool = False
) -> Tensor:
    """Return the scores [B, C], float32 (float64 for float64), with gradient (once).

    queries: packed. chunk_mib: bound on the part of the grid that is held at once, or of its maxima if `fused`.
    """
    starts_C = passages.lengths.cumsum(0) - passages.lengths if passages.starts is None else passages.starts
    sides = queries.vectors, passages.vectors, queries.lengths, passages.lengths, starts_C
    return _MaxSim.apply(*sides, (mean, chunk_mib, passages.most() if fused else None))


def ring_max_sim(
    queries: Tokens, passages: Tokens, lengths: list[Tensor], rank: int, group: ProcessGroup | None,
    *, mean: bool, chunk_mib: float | None, fused: bool = False,
) -> Tensor:  # fmt: skip
    """Return the scores [B, N] against the passages of all ranks, of which only a few ranks' vectors are ever held.

    queries, passages: packed. lengths: of the passages, by rank.
    """
    options = mean, chunk_mib, Tokens(passages.vectors, torch.cat(lengths)).most() if fused else None
    return _RingMaxSim.apply(queries.vectors, passages.vectors, queries.lengths, lengths, rank, group, options)


def make_grid(queries_nD: Tensor, lengths_B: Tensor, mean: bool, chunk_mib: float | None, longest: int | None):
    """Return a `Grid`, or its like in Triton for passages of up to `longest` tokens."""
    if longest is not None:
        from inbatch.losses.triton.max_sim import FusedGrid  # here, since it imports triton

        return FusedGrid(queries_nD, lengths_B, mean, chunk_mib, longest)
    return Grid(queries_nD, lengths_B, mean, chunk_mib)


class _MaxSim(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries_nD, passages_mD, lengths_B, lengths_C, starts_C, options):  # pyright: ignore[reportIncompatibleMethodOverride]
        grid = make_grid(queries_nD, lengths_B, *options)
        scores_BC, places = grid.scores(passages_mD, lengths_C, starts_C)
        ctx.save_for_backward(queries_nD, passages_mD, lengths_B, lengths_C, starts_C, places)
        ctx.options = options
        return scores_BC

    @staticmethod
    def backward(ctx, d_scores_BC):  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_second_derivatives()
        queries_nD, passages_mD, lengths_B, lengths_C, starts_C, places = ctx.saved_tensors
        grid = make_grid(queries_nD, lengths_B, *ctx.options)
        d_queries_nD = torch.zeros_like(queries_nD, dtype=grid.dtype)
        d_passages_mD = grid.add_gradients(
            d_scores_BC, passages_mD, lengths_C, starts_C, places, d_queries_nD, passages_mD.dtype
        )
        return d_queries_nD.to(queries_nD.dtype), d_passages_mD, None, None, None, None


class Grid:
    """The queries' side of the grid of token pairs, and what is computed of it for one set of passages at a time."""

    def __init__(self, queries_nD: Tensor, lengths_B: Tensor, mean: bool, chunk_mib: float | None):
        self.dtype = torch.promote_types(queries_nD.dtype, torch.float32)
        self.queries_nD, self.lengths, device = queries_nD, lengths_B.tolist(), queries_nD.device
        self.text_n = torch.repeat_interleave(torch.arange(len(lengths_B), device=device), lengths_B)
        self.factor_B = lengths_B.to(self.dtype).reciprocal() if mean else torch.ones_like(lengths_B, dtype=self.dtype)
        mib = _CHUNK_MIB.get(device.type, _CHUNK_MIB["cpu"]) if chunk_mib is None else chunk_mib
        self._elements = int(mib * 2**20 / self.dtype.itemsize)

    def scores(
        self, passages_mD: Tensor, lengths_C: Tensor, starts_C: Tensor, *, keep_places: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return the scores [B, C], and for each query token and passage the place of the maximum in it, int [n, C]."""
        num_tokens, num_passages = len(self.queries_nD), len(lengths_C)
        scores_BC = self.queries_nD.new_zeros(len(self.lengths), num_passages, dtype=self.dtype)
        longest = int(lengths_C.max()) if num_passages else 0
        place_dtype = torch.int16 if longest < 2**15 else torch.int32
        shape = (num_tokens if keep_places else 0, num_passages)
        places_nC = torch.empty(shape, dtype=place_dtype, device=self.queries_nD.device)
        for columns_c, tokens_cT, missing_cT in self._passage_chunks(lengths_C, starts_C):
            passages_D = passages_mD[tokens_cT.flatten()].to(self.dtype)
            for rows, tokens in self._query_chunks(tokens_cT.numel()):
                grid_tcT = (self.queries_nD[tokens].to(self.dtype) @ passages_D.T).view(-1, *tokens_cT.shape)
                if missing_cT is not None:
                    grid_tcT.masked_fill_(missing_cT, -torch.inf)
                if keep_places:
                    best_tc, place_tc = grid_tcT.max(2)
                    places_nC[tokens, columns_c] = place_tc.to(place_dtype)
                else:
                    best_tc = grid_tcT.amax(2)
                scores_BC[rows, columns_c] = self._summed(best_tc, rows, tokens)
        return scores_BC.mul_(self.factor_B[:, None]), places_nC

    def add_gradients(
        self, d_scores_BC: Tensor, passages_mD: Tensor, lengths_C: Tensor, starts_C: Tensor, places_nC: Tensor,
        d_queries_nD: Tensor, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """Add to the gradient of the query tokens, and return that of the passage tokens [m, D] in `dtype`."""
        d_passages_mD = torch.zeros_like(passages_mD, dtype=dtype)
        d_scores_BC = d_scores_BC * self.factor_B[:, None]
        for columns_c, tokens_cT, missing_cT in self._passage_chunks(lengths_C, starts_C):
            passages_D = passages_mD[tokens_cT.flatten()].to(self.dtype)
            d_chunk_D = torch.zeros_like(passages_D)  # each passage is in one chunk, whose sum is rounded once
            for _, tokens in self._query_chunks(tokens_cT.numel()):
                # Each pair of a query token and a passage has one place, so that nothing is added up here.
                d_grid_tcT = self.queries_nD.new_zeros(
                    len(places_nC[tokens]), *tokens_cT.shape, dtype=self.dtype
                ).scatter_(
                    2,
                    places_nC[tokens][:, columns_c, None].long(),
                    d_scores_BC[self.text_n[tokens]][:, columns_c, None],
                )
                d_grid_tP = d_grid_tcT.flatten(1)
                d_queries_nD[tokens] += d_grid_tP @ passages_D
                d_chunk_D += d_grid_tP.T @ self.queries_nD[tokens].to(self.dtype)
            d_chunk_D = d_chunk_D.to(dtype)
            if missing_cT is None:
                d_passages_mD[tokens_cT.flatten()] = d_chunk_D
            else:
                d_passages_mD[tokens_cT[~missing_cT]] = d_chunk_D.view(*tokens_cT.shape, -1)[~missing_cT]
        return d_passages_mD

    def _passage_chunks(self, lengths_C: Tensor, starts_C: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield passages of like length [c], the places of their tokens [c, T], and which of these are none [c, T]."""
        device, lengths = lengths_C.device, lengths_C.tolist()
        order = sorted(range(len(lengths)), key=lambda column: (-lengths[column], column))
        # As wide as the products want, as long as a text of the queries fits.
        width = max(1, self._elements // max(256, *self.lengths, 1))
        start = 0
        while start < len(order):
            longest = lengths[order[start]]
            stop = start + max(1, width // longest)
            columns_c = torch.tensor(order[start:stop], device=device)
            place_T = torch.arange(longest, device=device)
            missing_cT = place_T >= lengths_C[columns_c, None]
            tokens_cT = starts_C[columns_c, None] + place_T
            uneven = lengths[order[min(stop, len(order)) - 1]] < longest
            yield (
                columns_c,
                tokens_cT.masked_fill(missing_cT, 0) if uneven else tokens_cT,
                missing_cT if uneven else None,
            )
            start = stop

    def _query_chunks(self, num_columns: int) -> Iterator[tuple[slice, slice]]:
        """Yield ranges of whole queries and of their tokens, whose grid with so many passage tokens fits a chunk."""
        most = max(1, self._elements // num_columns)
        row = token = 0
        while row < len(self.lengths):
            first, first_token = row, token
            while row < len(self.lengths) and (row == first or token + self.lengths[row] - first_token <= most):
                token += self.lengths[row]
                row += 1
            yield slice(first, row), slice(first_token, token)

    def _summed(self, best_tc: Tensor, rows: slice, tokens: slice) -> Tensor:
        """Return the sums [b, c] over the tokens of each text, in their order."""
        lengths = self.lengths[rows]
        if min(lengths) == max(lengths):
            return best_tc.view(len(lengths), lengths[0], -1).sum(1)
        # Not pad_sequence, which on a GPU is a kernel for each text.
        text_t = self.text_n[tokens] - rows.start
        place_t = torch.cat([torch.arange(length) for length in lengths]).to(best_tc.device)
        padded_bxc = best_tc.new_zeros(len(lengths), max(lengths), best_tc.shape[1])
        padded_bxc[text_t, place_t] = best_tc
        return padded_bxc.sum(1)


class _RingMaxSim(torch.autograd.Function):
    """Scores against passages that travel from rank to rank in both passes and are never gathered."""

    @staticmethod
    def forward(ctx, queries_nD, passages_mD, lengths_B, lengths_by_rank, rank, group, options):  # pyright: ignore[reportIncompatibleMethodOverride]
        grid, size = make_grid(queries_nD, lengths_B, *options), len(lengths_by_rank)
        token_counts = torch.stack([lengths.sum() for lengths in lengths_by_rank]).tolist()
        scores: list[Tensor] = [queries_nD] * size
        places: list[Tensor] = [queries_nD] * size
        for owner, (vectors_mD,) in around([passages_mD], token_counts, rank, group):
            lengths_C = lengths_by_rank[owner]
            scores[owner], places[owner] = grid.scores(vectors_mD, lengths_C, lengths_C.cumsum(0) - lengths_C)
        ctx.save_for_backward(queries_nD, passages_mD, lengths_B, *lengths_by_rank, *places)
        ctx.options = token_counts, rank, group, options
        return torch.cat(scores, dim=1)

    @staticmethod
    def backward(ctx, d_scores_BC):  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_second_derivatives()
        token_counts, rank, group, options = ctx.options
        queries_nD, passages_mD, lengths_B, *others = ctx.saved_tensors
        size = len(token_counts)
        lengths_by_rank, places = others[:size], others[size:]
        grid = make_grid(queries_nD, lengths_B, *options)
        d_scores = d_scores_BC.split([len(lengths) for lengths in lengths_by_rank], dim=1)
        d_queries_nD = torch.zeros_like(queries_nD, dtype=grid.dtype)
        shift = None  # the gradient of the passages travels one hop behind them, and every rank adds its share
        for hop, (owner, (vectors_mD,)) in enumerate(around([passages_mD], token_counts, rank, group)):
            lengths_C = lengths_by_rank[owner]
            of_passages = vectors_mD, lengths_C, lengths_C.cumsum(0) - lengths_C, places[owner]
            gradient_mD = grid.add_gradients(d_scores[owner], *of_passages, d_queries_nD, grid.dtype)
            if shift is not None:
                gradient_mD += shift.wait()[0]
            shift = collectives.ring_shift([gradient_mD], collectives.held(token_counts, hop), group)
        assert shift is not None
        (d_passages_mD,) = shift.wait()
        return d_queries_nD.to(queries_nD.dtype), d_passages_mD.to(passages_mD.dtype), *[None] * 5
