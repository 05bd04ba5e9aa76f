"""Exact nearest neighbours by MaxSim, for texts of several vectors: every passage is scored, sharded over the ranks.

The score is  sum over tokens x of the query of  max over tokens y of the passage of  x . y,  made in float64 and
rounded to float32. Equal scores rank by index. As in `search`, float32 scores of a block only sort out, in bounded
memory, and the answer is the same for any number of ranks and any chunks.

Shapes: B queries of n tokens in all, N passages of this rank of m tokens in all, packed text after text, D dimension;
C passages in a block, P pairs of a query and a passage, t and T tokens of the longest query and passage of these.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from inbatch import collectives
from inbatch.losses.info_nce import describe
from inbatch.losses.max_sim import make_grid
from inbatch.retrieval.search import Tile, best_of, misuse, norms, product_error, unusable

_BLOCK_TOKENS = 1 << 18  # of passages, and at most a 16th as many passages
_QUERY_TOKENS = 32768
_PAIR_ELEMENTS = 1 << 21  # 16 MiB of float64: the tokens and the products of pairs that are scored exactly at a time


def max_sim_top_k(
    query_vectors: Tensor,
    query_lengths: Tensor,
    passage_vectors: Tensor,
    passage_lengths: Tensor,
    k: int,
    *,
    offset: int | None = None,
    exclude: Tensor | None = None,
    group=None,
    query_tokens: int = _QUERY_TOKENS,
    block_tokens: int = _BLOCK_TOKENS,
) -> tuple[Tensor, Tensor]:
    """Return the k passages that score highest for each query, best first; equal scores: the lower index first.

    query_vectors [n, D] float, query_lengths [B] int64: the queries' tokens, text after text, and how many each has;
    the same on every rank. passage_vectors [m, D], passage_lengths [N]: this rank's share (N may differ, or be 0); it
    may stay in host memory while the queries are on a GPU. offset, exclude: as for `search.top_k`. query_tokens,
    block_tokens: how many are scored at a time, or one text.

    Returns (scores [B, k] float32, indices [B, k] int64) on the queries' device, the same on every rank;
    min(k, all passages) columns. A query to which exclusion leaves fewer ends in (-inf, -1). No gradient.

    Raises ValueError, on every rank, for vectors that are not a float matrix, lengths that do not add up or are 0,
    k < 1, no passages at all, NaN or infinity, or ranks that disagree on dimension, dtype, k or the number of queries.
    """
    what, device = "max_sim_top_k", None
    sides = {"query": (query_vectors, query_lengths), "passage": (passage_vectors, passage_lengths)}
    matrices = {"query_vectors": query_vectors, "passage_vectors": passage_vectors}
    error = misuse(what, k, query_tokens, block_tokens, **matrices) or _wrong_lengths(what, sides)
    fields, same = {}, {}
    norms_m = norms_B = torch.empty(0)
    if error is None:
        device = query_vectors.device
        norms_m = norms(passage_vectors, _BLOCK_TOKENS, device)
        norms_n = norms(query_vectors, _BLOCK_TOKENS, device)
        norms_B = torch.segment_reduce(norms_n, "sum", lengths=query_lengths.to(device)) if len(norms_n) else norms_n
        error = unusable(what, {"passage tokens": norms_m, "queries": norms_B})
        fields = {"queries": query_vectors, "passages": passage_lengths.to(device)}
        same = {"k": k, "number of queries": len(query_lengths), "passage dtype": str(passage_vectors.dtype)}
    rows = collectives.agree(what, fields, group=group, same=same, error=error)["passages"]
    if sum(rows) == 0:
        raise ValueError(f"{what}: there are no passages on any rank; expected at least one")
    assert device is not None
    start = sum(rows[: collectives.rank(group)]) if offset is None else offset
    tiles = _tiles(*sides["query"], *sides["passage"], norms_B, norms_m, start, query_tokens, block_tokens)
    return best_of(tiles, len(query_lengths), min(k, sum(rows)), exclude, device, group)


@torch.no_grad()
def max_sim_pair_scores(
    query_vectors: Tensor, query_lengths: Tensor, passage_vectors: Tensor, passage_lengths: Tensor, pairs: Tensor
) -> Tensor:
    """Return the scores [P] of pairs [P, 2] (a query, a passage), as `max_sim_top_k` gives them."""
    starts_B, starts_N = (lengths.cumsum(0) - lengths for lengths in (query_lengths, passage_lengths))
    if not len(pairs):
        return torch.empty(0, device=query_vectors.device)
    t, T, scores = int(query_lengths.max()), int(passage_lengths.max()), []
    for some in pairs.split(max(1, _PAIR_ELEMENTS // (t * T + (t + T) * query_vectors.shape[1]))):
        rows_P, columns_P = some.to(query_lengths.device)[:, 0], some.to(passage_lengths.device)[:, 1]
        queries_PtD, missing_Pt = _padded(query_vectors, starts_B[rows_P], query_lengths[rows_P])
        passages_PTD, missing_PT = _padded(passage_vectors, starts_N[columns_P], passage_lengths[columns_P])
        grid_PtT = queries_PtD @ passages_PTD.to(queries_PtD.device).mT
        best_Pt = grid_PtT.masked_fill_(missing_PT.to(grid_PtT.device)[:, None], -torch.inf).amax(2)
        scores.append(best_Pt.masked_fill_(missing_Pt, 0.0).sum(1))
    return torch.cat(scores).float()


def _padded(vectors_mD: Tensor, starts_P: Tensor, lengths_P: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens [P, T, D] of texts in float64, and where none is [P, T]."""
    place_T = torch.arange(int(lengths_P.max()), device=lengths_P.device)
    missing_PT = place_T >= lengths_P[:, None]
    tokens_PT = (starts_P[:, None] + place_T).masked_fill_(missing_PT, 0)
    return vectors_mD[tokens_PT.to(vectors_mD.device)].double(), missing_PT


@torch.no_grad()
def _tiles(
    query_vectors: Tensor, query_lengths: Tensor, passage_vectors: Tensor, passage_lengths: Tensor,
    norms_B: Tensor, norms_m: Tensor, offset: int, query_tokens: int, block_tokens: int,
) -> Iterator[Tile]:  # fmt: skip
    device, dtype = query_vectors.device, torch.promote_types(query_vectors.dtype, passage_vectors.dtype)
    query_vectors, query_lengths = query_vectors.to(dtype), query_lengths.to(device)
    fused = None
    if query_vectors.is_cuda:
        from inbatch.losses.triton import host  # here, since it imports triton

        fused = 0 if host.why_not(query_vectors[None]) is None else None  # no places are kept, whatever the lengths
    chunks = [
        (rows, query_vectors[tokens], query_lengths[rows]) for rows, tokens in _ranges(query_lengths, query_tokens)
    ]
    grids = [make_grid(vectors_nD, lengths, False, None, fused) for _, vectors_nD, lengths in chunks]
    terms = query_vectors.shape[1] + (int(query_lengths.max()) if len(query_lengths) else 0)
    for columns, tokens in _ranges(passage_lengths, block_tokens):
        block_mD, lengths_C = passage_vectors[tokens].to(device, dtype), passage_lengths[columns].to(device)
        starts_C = lengths_C.cumsum(0) - lengths_C
        error_B = product_error(norms_B, norms_m[tokens].max(), terms)
        for (rows, vectors_nD, lengths), grid in zip(chunks, grids, strict=True):
            rough_BC, _ = grid.scores(block_mD, lengths_C, starts_C, keep_places=False)

            def exact(
                rows_P: Tensor, columns_P: Tensor, vectors_nD=vectors_nD, lengths=lengths, block_mD=block_mD,
                lengths_C=lengths_C,
            ) -> Tensor:  # fmt: skip
                pairs = torch.stack([rows_P, columns_P], dim=1)
                return max_sim_pair_scores(vectors_nD, lengths, block_mD, lengths_C, pairs)

            start = offset + columns.start
            yield Tile(rows=rows, start=start, rough_QC=rough_BC.float(), error_Q=error_B[rows], exact=exact)


def _ranges(lengths: Tensor, most: int) -> Iterator[tuple[slice, slice]]:
    """Yield ranges of texts of so many tokens or one text, and of their tokens; at most a 16th as many texts."""
    first = first_token = token = 0
    for text, length in enumerate(lengths.tolist()):
        if text > first and (token + length - first_token > most or 16 * (text - first) >= most):
            yield slice(first, text), slice(first_token, token)
            first, first_token = text, token
        token += length
    if first < len(lengths):
        yield slice(first, len(lengths)), slice(first_token, token)


def _wrong_lengths(what: str, sides: dict[str, tuple[Tensor, Tensor]]) -> str | None:
    for name, (vectors, lengths) in sides.items():
        if not isinstance(lengths, Tensor) or lengths.ndim != 1 or lengths.dtype != torch.int64:
            return f"{what}: {name}_lengths are {describe(lengths)}; expected int64, the number of tokens of each text"
        if len(lengths) and int(lengths.min()) < 1:
            return f"{what}: {name} {int(lengths.argmin())} has {int(lengths.min())} tokens; expected at least one"
        if int(lengths.sum()) != len(vectors):
            return f"{what}: {name}_lengths add up to {int(lengths.sum())}, of {len(vectors)} vectors; expected as many"
    return None
