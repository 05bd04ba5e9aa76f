"""Exact nearest neighbours: every document is scored, sharded over the ranks, in bounded memory.

A score is the float64 product (or cosine) of two vectors, rounded to float32; equal scores rank by document index.
The answer depends on the vectors alone: it is the same for any number of ranks, any blocks and any matmul precision.

A float32 product of each block serves to discard: a document whose rough score is further below the k-th best score so
far than rounding can explain is dropped. The others are scored in float64. Score and index then make one int64 key, the
score's bits above the index's, so that the best documents have the largest keys and there are no ties.

Shapes: Q queries, N documents of this rank, C documents in a block, P pairs of a query and a document, D dimension.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inbatch import collectives
from inbatch.losses.info_nce import describe

SIMILARITIES = ("cosine", "dot")
_PAIR_ELEMENTS = 1 << 20  # 8 MiB of float64: the vectors gathered at a time to be scored exactly
_LAST_INDEX = 0xFFFFFFFF


def top_k(
    queries: Tensor,
    documents: Tensor,
    k: int,
    *,
    offset: int | None = None,
    similarity: str = "dot",
    exclude: Tensor | None = None,
    group=None,
    query_chunk: int = 1024,
    document_chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the k documents that score highest for each query, best first; equal scores: the lower index first.

    queries: [Q, D] float, the same on every rank. documents: [N, D] float, this rank's share (N may differ, or be 0);
    it may stay in host memory while the queries are on a GPU. offset: global index of this rank's first document; None
    means that the shares follow one another in rank order. similarity: "dot", or "cosine" (a zero vector scores 0).
    exclude: [E, 2] int64 pairs (row of a query, global index of a document) that are never returned.

    Returns (scores [Q, k] float32, indices [Q, k] int64) on the queries' device, the same on every rank, for any split
    and any chunks; min(k, all documents) columns. A query to which exclusion leaves fewer ends in (-inf, -1).
    document_chunk: None is 65536 on a GPU, where launches take as long as the products of fewer, 16384 on a CPU.
    Memory beyond the inputs: about 32 * query_chunk * document_chunk bytes, and 8 * Q * k for each rank. No gradient.

    Raises ValueError, on every rank, for inputs other than float matrices, k < 1, no documents at all, NaN or infinity
    in an embedding, or ranks that disagree on dimension, dtype, k or similarity.
    """
    if document_chunk is None:
        document_chunk = 65536 if isinstance(queries, Tensor) and queries.is_cuda else 16384
    error = misuse("top_k", k, query_chunk, document_chunk, queries=queries, documents=documents)
    if similarity not in SIMILARITIES:
        error = f"top_k: similarity is {similarity!r}; expected one of {', '.join(SIMILARITIES)}"
    norms_N = norms_Q = torch.empty(0)
    if error is None:
        norms_N, norms_Q = (norms(rows, document_chunk, queries.device) for rows in (documents, queries))
        error = unusable("top_k", {"documents": norms_N, "queries": norms_Q})
    fields, same = {}, {}
    if error is None:  # else they may not be tensors
        # Documents never travel, and the group may not communicate on their device: agree on a view without columns.
        fields = {"queries": queries, "documents": documents[:, :0].to(queries.device)}
        same = {"k": k, "similarity": similarity, "number of queries": len(queries)}
    rows = collectives.agree("top_k", fields, group=group, same=same, error=error)["documents"]
    if sum(rows) == 0:
        raise ValueError("top_k: there are no documents on any rank; expected at least one")
    assert sum(rows) <= _LAST_INDEX
    start = sum(rows[: collectives.rank(group)]) if offset is None else offset
    cosine = similarity == "cosine"
    tiles = _tiles(queries, norms_Q, documents, norms_N, start, query_chunk, document_chunk, cosine=cosine)
    return best_of(tiles, len(queries), min(k, sum(rows)), exclude, queries.device, group)


@torch.no_grad()
def pair_scores(queries: Tensor, documents: Tensor, pairs: Tensor, *, similarity: str = "dot") -> Tensor:
    """Return the scores [P] of pairs [P, 2] (row of a query, row of a document), as `top_k` gives them."""
    chosen, rows = documents[pairs[:, 1].to(documents.device)].to(queries.device), pairs[:, 0].to(queries.device)
    scores = torch.linalg.vecdot(queries[rows].double(), chosen.double())
    if similarity == "cosine":
        scores *= _inverse(queries[rows].double().norm(dim=1) * chosen.double().norm(dim=1))
    return scores.float()


def misuse(what: str, k: Any, *chunks: int, **matrices: Any) -> str | None:
    """Return the first mistake in a search's arguments, in words; None if there is none. matrices: of both sides."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        return f"{what}: k is {k!r}; expected an integer of at least 1"
    if min(chunks) < 1:
        return f"{what}: the sizes of chunks are {chunks}; expected at least 1"
    for name, matrix in matrices.items():
        if not isinstance(matrix, Tensor) or matrix.ndim != 2 or not matrix.is_floating_point():
            return f"{what}: {name} are {describe(matrix)}; expected a float matrix, one vector a row"
    (first, left), (second, right) = matrices.items()
    if left.shape[1] != right.shape[1]:
        return (
            f"{what}: {first} have dimension {left.shape[1]}, {second} {right.shape[1]}; "
            "expected embeddings of one model"
        )
    return None


@torch.no_grad()
def norms(rows_ND: Tensor, chunk: int, device: torch.device) -> Tensor:
    """Return the lengths [N] of vectors in float64, on the device."""
    empty = torch.empty(0, dtype=torch.float64, device=device)
    return torch.cat([empty, *(block.to(device).double().norm(dim=1) for block in rows_ND.split(chunk) if len(block))])


def unusable(what: str, sides: dict[str, Tensor]) -> str | None:
    """Return the first fault of documents or queries, by the norms of their vectors; None if there is none."""
    for name, norms_N in sides.items():
        # The norm, not the elements, since it is there already and needs no mask of the matrix's size.
        bad = (~norms_N.isfinite()).nonzero()
        if len(bad):
            return (
                f"{what}: {len(bad)} of {len(norms_N)} {name} on this rank hold NaN or infinity, the first in row "
                f"{int(bad[0])}; expected finite embeddings: look at the model (did the training diverge?)"
            )
    longest = {name: float(norms_N.max()) for name, norms_N in sides.items() if len(norms_N)}
    if len(longest) == len(sides) and math.prod(longest.values()) > torch.finfo(torch.float32).max / 2:
        lengths = " and ".join(f"{length:.1e} ({name})" for name, length in longest.items())
        return (
            f"{what}: embeddings are as long as {lengths}, so scores would overflow float32; expected smaller vectors, "
            "or scale them"
        )
    return None


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Rough scores of some queries for a block of documents, and a function for exact ones."""

    rows: slice  # of the queries
    start: int  # global index of the block's first document
    rough_QC: Tensor  # float32; it is written to
    error_Q: Tensor  # bound on |rough score - score|
    exact: Callable[[Tensor, Tensor], Tensor]  # rows and columns [P] of pairs of the tile -> scores [P]


@torch.no_grad()
def best_of(
    tiles: Iterable[Tile], num_queries: int, k: int, exclude: Tensor | None, device: torch.device, group
) -> tuple[Tensor, Tensor]:
    """Return the scores and indices [Q, k] of the best documents in the tiles of all ranks, as `top_k` does."""
    exclude_E2 = torch.empty(0, 2, dtype=torch.int64) if exclude is None else exclude
    with torch.autocast(device.type, enabled=False):
        keys_Qk = _best_keys(tiles, num_queries, k, exclude_E2.to(device))
        every_Qk = collectives.all_gather(keys_Qk, group, rows=[num_queries] * collectives.world_size(group))
        return _decoded(torch.cat(every_Qk.split(max(1, num_queries)), dim=1).topk(k).values)


def _best_keys(tiles: Iterable[Tile], num_queries: int, k: int, exclude_E2: Tensor) -> Tensor:
    """Return the keys [Q, k] of this rank's best documents in falling order; _keys(-inf, -1) where it has fewer."""
    device = exclude_E2.device
    best_Qk = _keys(torch.full((num_queries, k), -torch.inf, device=device), torch.tensor(-1, device=device))
    for tile in tiles:
        some, rough_QC = tile.rows, tile.rough_QC
        inside_E2 = exclude_E2 - exclude_E2.new_tensor([some.start, tile.start])
        inside_E2 = inside_E2[((inside_E2 >= 0) & (inside_E2 < exclude_E2.new_tensor(rough_QC.shape))).all(1)]
        rough_QC[inside_E2[:, 0], inside_E2[:, 1]] = -torch.inf
        rows_P, columns_P = _candidates(rough_QC, _decoded(best_Qk[some, -1])[0], tile.error_Q, k)
        keys_P = _keys(tile.exact(rows_P, columns_P).float(), columns_P + tile.start)
        best_Qk[some] = _merged(best_Qk[some], rows_P, keys_P)
    return best_Qk


@torch.no_grad()
def _tiles(
    queries_QD: Tensor, norms_Q: Tensor, documents_ND: Tensor, norms_N: Tensor, offset: int, query_chunk: int,
    document_chunk: int, *, cosine: bool,
) -> Iterator[Tile]:  # fmt: skip
    rough_QD = _rough(queries_QD, norms_Q, cosine)
    for first in range(0, len(documents_ND), document_chunk):
        norms_C = norms_N[first : first + document_chunk]
        block_CD = documents_ND[first : first + document_chunk].to(queries_QD.device)
        rough_CD = _rough(block_CD, norms_C, cosine)
        if cosine:
            error_Q = torch.full_like(norms_Q, _relative_error(queries_QD.shape[1])).float()
        else:
            error_Q = product_error(norms_Q, norms_C.max(), queries_QD.shape[1])
        for row in range(0, len(queries_QD), query_chunk):
            some = slice(row, row + query_chunk)

            def exact(rows_P: Tensor, columns_P: Tensor, some=some, block_CD=block_CD, norms_C=norms_C) -> Tensor:
                scores_P = _products(queries_QD[some], block_CD, rows_P, columns_P)
                return scores_P * _inverse(norms_Q[some][rows_P] * norms_C[columns_P]) if cosine else scores_P

            rough_QC = rough_QD[some] @ rough_CD.T
            yield Tile(rows=some, start=offset + first, rough_QC=rough_QC, error_Q=error_Q[some], exact=exact)


def _rough(rows_ND: Tensor, norms_N: Tensor, cosine: bool) -> Tensor:
    return (rows_ND * _inverse(norms_N)[:, None] if cosine else rows_ND).float()


def _inverse(norms: Tensor) -> Tensor:
    return torch.where(norms > 0, norms.reciprocal(), 0.0)


def product_error(norms_Q: Tensor, longest: Tensor, terms: int) -> Tensor:
    """Return a bound [Q] on |rough score - score|, for documents as long as `longest` and sums of so many terms."""
    return (_relative_error(terms) * norms_Q * longest + terms * 2.0**-126 * (1 + norms_Q + longest)).float()


def _relative_error(terms: int) -> float:
    """Return a bound on the error of a sum of products of factors of length 1.

    A float32 sum of D products, in any order, is within D 2^-24 |q| |d| of the true one; twice that, and some, covers
    the roundings of the factors and of the score too. Torch may be set to round the factors to bfloat16 first: 2^-8.
    """
    try:
        coarse = torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set for each backend
        coarse = True
    return (terms + 8) * 2.0**-23 + (1.01 * 2.0**-8 if coarse else 0.0)


def _candidates(rough_QC: Tensor, floor_Q: Tensor, error_Q: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the rows and columns of all documents that may be among the k best, given the k-th best scores so far."""
    known = not floor_Q.isneginf().any()
    for tighten in (False, True) if known else (True,):
        if tighten and k < rough_QC.shape[1]:
            floor_Q = torch.maximum(floor_Q, rough_QC.topk(k, sorted=False).values.amin(1) - error_Q)
        # The least float32 is above the -inf of excluded documents.
        passing_QC = rough_QC >= (floor_Q - error_Q).clamp_min(torch.finfo(torch.float32).min)[:, None]
        rows_P, columns_P = passing_QC.nonzero(as_tuple=True)
        if len(rows_P) <= 2 * k * len(rough_QC):
            break
    return rows_P, columns_P


def _products(queries_QD: Tensor, block_CD: Tensor, rows_P: Tensor, columns_P: Tensor) -> Tensor:
    """Return the float64 products [P] of pairs."""
    if 8 * len(rows_P) > len(queries_QD) * len(block_CD):  # as for a model whose embeddings have become all alike
        return (queries_QD.double() @ block_CD.double().T)[rows_P, columns_P]
    pairs = (indices.split(max(1, _PAIR_ELEMENTS // max(1, block_CD.shape[1]))) for indices in (rows_P, columns_P))
    return torch.cat(
        [
            (queries_QD[rows].double()[:, None] @ block_CD[columns].double()[:, :, None]).flatten()
            for rows, columns in zip(*pairs, strict=True)
        ]
    )


def _merged(best_Qk: Tensor, rows_P: Tensor, keys_P: Tensor) -> Tensor:
    """Return the k largest keys [Q, k] of the best so far and of new ones, whose rows are given in order."""
    counts_Q = torch.bincount(rows_P, minlength=len(best_Qk))
    places_P = torch.arange(len(rows_P), device=rows_P.device) - (counts_Q.cumsum(0) - counts_Q)[rows_P]
    new_QK = best_Qk.new_full((len(best_Qk), int(counts_Q.max())), torch.iinfo(torch.int64).min)
    new_QK[rows_P, places_P] = keys_P
    return torch.cat([best_Qk, new_QK], dim=1).topk(best_Qk.shape[1]).values


def _keys(scores: Tensor, indices: Tensor) -> Tensor:
    """Return int64 keys that order as (score, -index) do: the bits of a float order as integers, sign apart."""
    bits = (scores + 0.0).view(torch.int32).long()  # -0.0 is 0.0
    return torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF) * 2**32 + (_LAST_INDEX - (indices & _LAST_INDEX))


def _decoded(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores and indices of keys."""
    bits, indices = keys >> 32, _LAST_INDEX - (keys & _LAST_INDEX)
    scores = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).int().view(torch.float32)
    return scores, torch.where(indices == _LAST_INDEX, -1, indices)
