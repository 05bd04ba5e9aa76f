"""Exact nearest neighbours: every document is scored, sharded over the ranks, in bounded memory.

A score is the float64 product (or cosine) of two vectors, rounded to float32; equal scores rank by document index.
The answer depends on the vectors alone: it is the same for any number of ranks, any blocks and any matmul precision.

Score and index make one int64 key, the score's bits above the index's, so that the best documents are the largest keys
and there are no ties to break.

Shapes: Q queries, N documents of this rank, C documents in a block, P pairs of a query and a document, D dimension.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from inbatch import collectives

SIMILARITIES = ("cosine", "dot")
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
    document_chunk: int = 16384,
) -> tuple[Tensor, Tensor]:
    """Return the k documents that score highest for each query, best first; equal scores: the lower index first.

    queries: [Q, D] float, the same on every rank. documents: [N, D] float, this rank's share (N may differ, or be 0);
    it may stay in host memory while the queries are on a GPU. offset: global index of this rank's first document; None
    means that the shares follow one another in rank order. similarity: "dot", or "cosine" (a zero vector scores 0).
    exclude: [E, 2] int64 pairs (row of a query, global index of a document) that are never returned.

    Returns (scores [Q, k] float32, indices [Q, k] int64) on the queries' device, the same on every rank, for any split
    and any chunks; min(k, all documents) columns. A query to which exclusion leaves fewer ends in (-inf, -1).
    Memory beyond the inputs: about 16 * query_chunk * document_chunk bytes, and 8 * Q * k for each rank. No gradient.

    Raises ValueError, on every rank, for what is no float matrix, k < 1, no documents at all, NaN or infinity in an
    embedding, or ranks that disagree on dimension, dtype, k or similarity.
    """
    error = _misuse(queries, documents, k, similarity, query_chunk, document_chunk)
    norms_N = norms_Q = torch.empty(0)
    if error is None:
        norms_N, norms_Q = (_norms(rows, document_chunk, queries.device) for rows in (documents, queries))
        error = _unusable(norms_N, norms_Q)
    fields, same = {}, {}
    if error is None:  # else they may not be tensors
        # Documents never travel, so they may be where the group does not communicate: agree on a view without columns.
        fields = {"queries": queries, "documents": documents[:, :0].to(queries.device)}
        same = {"k": k, "similarity": similarity, "number of queries": len(queries)}
    rows = collectives.agree("top_k", fields, group=group, same=same, error=error)["documents"]
    if sum(rows) == 0:
        raise ValueError("top_k: there are no documents on any rank; expected at least one")
    assert sum(rows) <= _LAST_INDEX
    shard = _Shard(
        documents=documents,
        norms_N=norms_N,
        offset=sum(rows[: collectives.rank(group)]) if offset is None else offset,
        cosine=similarity == "cosine",
        chunk=document_chunk,
    )
    exclude_E2 = queries.new_empty(0, 2, dtype=torch.int64) if exclude is None else exclude.to(queries.device)
    k = min(k, sum(rows))
    with torch.no_grad(), torch.autocast(queries.device.type, enabled=False):
        keys_Qk = _best_keys(queries, norms_Q, shard, k, exclude_E2, query_chunk)
        every_Qk = collectives.all_gather(keys_Qk, group, rows=[len(queries)] * len(rows))
        return _decoded(torch.cat(every_Qk.split(max(1, len(queries))), dim=1).topk(k).values)


@torch.no_grad()
def pair_scores(queries: Tensor, documents: Tensor, pairs: Tensor, *, similarity: str = "dot") -> Tensor:
    """Return the scores [P] of pairs [P, 2] (row of a query, row of a document), as `top_k` gives them."""
    chosen, rows = documents[pairs[:, 1].to(documents.device)].to(queries.device), pairs[:, 0].to(queries.device)
    scores = torch.linalg.vecdot(queries[rows].double(), chosen.double())
    if similarity == "cosine":
        scores *= _inverse(queries[rows].double().norm(dim=1) * chosen.double().norm(dim=1))
    return scores.float()


def _misuse(queries: Tensor, documents: Tensor, k: int, similarity: str, *chunks: int) -> str | None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        return f"top_k: k is {k!r}; expected an integer of at least 1"
    if similarity not in SIMILARITIES:
        return f"top_k: similarity is {similarity!r}; expected one of {', '.join(SIMILARITIES)}"
    if min(chunks) < 1:
        return f"top_k: query_chunk and document_chunk are {chunks}; expected at least 1"
    for name, tensor in (("queries", queries), ("documents", documents)):
        if not isinstance(tensor, Tensor):
            return f"top_k: {name} are of type {type(tensor).__name__}; expected a float tensor, one embedding a row"
        if tensor.ndim != 2 or not tensor.is_floating_point():
            return (
                f"top_k: {name} are {tuple(tensor.shape)} {tensor.dtype}; expected a float matrix, one embedding a row"
            )
    if queries.shape[1] != documents.shape[1]:
        return (
            f"top_k: queries have dimension {queries.shape[1]}, documents {documents.shape[1]}; "
            "expected embeddings of one model"
        )
    return None


@torch.no_grad()
def _norms(rows_ND: Tensor, chunk: int, device: torch.device) -> Tensor:
    empty = torch.empty(0, dtype=torch.float64, device=device)
    return torch.cat([empty, *(block.to(device).double().norm(dim=1) for block in rows_ND.split(chunk) if len(block))])


def _unusable(norms_N: Tensor, norms_Q: Tensor) -> str | None:
    for name, norms in (("documents", norms_N), ("queries", norms_Q)):
        # isfinite of the norm and not of the elements: one pass serves both, and needs no mask of the matrix's size.
        bad = (~norms.isfinite()).nonzero()
        if len(bad):
            return (
                f"top_k: {len(bad)} of {len(norms)} {name} on this rank hold NaN or infinity, the first in row "
                f"{int(bad[0])}; expected finite embeddings: look at the model (did the training diverge?)"
            )
    if len(norms_N) and len(norms_Q) and float(norms_N.max() * norms_Q.max()) > torch.finfo(torch.float32).max / 2:
        return (
            f"top_k: embeddings are as long as {float(norms_Q.max()):.1e} (queries) and {float(norms_N.max()):.1e} "
            "(documents), so scores would overflow float32; expected smaller vectors, or scale them"
        )
    return None


@dataclass(frozen=True, kw_only=True)
class _Shard:
    documents: Tensor  # [N, D], any float dtype, any device
    norms_N: Tensor  # [N] float64, on the queries' device
    offset: int  # global index of the first document
    cosine: bool
    chunk: int


def _best_keys(
    queries_QD: Tensor, norms_Q: Tensor, shard: _Shard, k: int, exclude_E2: Tensor, query_chunk: int
) -> Tensor:
    """Return the keys [Q, k] of this rank's best documents in falling order; _keys(-inf, -1) where it has fewer."""
    device = queries_QD.device
    best_Qk = _keys(torch.full((len(queries_QD), k), -torch.inf, device=device), torch.tensor(-1, device=device))
    wide_QD = queries_QD.double()
    for first in range(0, len(shard.documents), shard.chunk):
        start, block_CD = first + shard.offset, shard.documents[first : first + shard.chunk].to(device)
        wide_CD, norms_C = block_CD.double(), shard.norms_N[first : first + shard.chunk]
        for row in range(0, len(queries_QD), query_chunk):
            some = slice(row, row + query_chunk)
            scores_QC = wide_QD[some] @ wide_CD.T
            if shard.cosine:  # after the product, which is exactly 0 for orthogonal integers
                scores_QC *= _inverse(norms_Q[some])[:, None] * _inverse(norms_C)
            scores_QC = scores_QC.float()
            inside_E2 = exclude_E2 - exclude_E2.new_tensor([row, start])
            inside_E2 = inside_E2[((inside_E2 >= 0) & (inside_E2 < exclude_E2.new_tensor(scores_QC.shape))).all(1)]
            scores_QC[inside_E2[:, 0], inside_E2[:, 1]] = -torch.inf
            best_Qk[some] = torch.cat([best_Qk[some], _best_of_block(scores_QC, start, k)], dim=1).topk(k).values
    return best_Qk


def _inverse(norms: Tensor) -> Tensor:
    return torch.where(norms > 0, norms.reciprocal(), 0.0)


def _best_of_block(scores_QC: Tensor, start: int, k: int) -> Tensor:
    """Return the keys [Q, min(k, C)] of the best documents of a block, the first of which has the index `start`."""
    k, size = min(k, scores_QC.shape[1]), scores_QC.shape[1]
    scores_Qk, columns_Qk = scores_QC.topk(min(k + 1, size))
    keys_Qk = _keys(scores_Qk, columns_Qk + start)[:, :k]
    if k < size:
        # Where equal scores reach over the end of the list, topk takes any of them. Keys decide, but take longer.
        tied_Q = scores_Qk[:, k - 1] == scores_Qk[:, k]
        if tied_Q.any():
            columns_C = torch.arange(start, start + size, device=scores_QC.device)
            keys_Qk[tied_Q] = _keys(scores_QC[tied_Q], columns_C).topk(k).values
    return keys_Qk.where(scores_Qk[:, :k] > -torch.inf, _keys(scores_Qk[:, :k], columns_Qk.new_tensor(-1)))


def _keys(scores: Tensor, indices: Tensor) -> Tensor:
    """Return int64 keys that order as (score, -index) do: the bits of a float order as integers, sign apart."""
    bits = (scores + 0.0).view(torch.int32).long()  # -0.0 is 0.0
    return torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF) * 2**32 + (_LAST_INDEX - (indices & _LAST_INDEX))


def _decoded(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores and indices of keys."""
    bits, indices = keys >> 32, _LAST_INDEX - (keys & _LAST_INDEX)
    scores = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).int().view(torch.float32)
    return scores, torch.where(indices == _LAST_INDEX, -1, indices)
