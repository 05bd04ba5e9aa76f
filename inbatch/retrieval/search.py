"""Exact nearest neighbours: every document is scored, sharded over the ranks, in bounded memory.

A document's score is its float64 product with the query, rounded to float32; documents with equal scores rank by index.
That is a total order which depends on the two vectors alone, so the answer is the same for any number of ranks and any
block size. Float64 products would be slow on many GPUs, and torch.topk picks arbitrarily among ties, so each block goes
through a float32 product and torch.topk first, which keep a few more than k candidates. Only candidates are scored in
float64. A float32 product is within a known bound of the true one, hence whoever was dropped is provably worse than the
k-th candidate, or (ties or near-ties at the boundary: rare) the query is searched again with the exact score of every
document and a stable sort.

Shapes: Q queries, N documents of this rank, C documents in a block, D dimension, K candidates kept, W world size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from inbatch import collectives

SIMILARITIES = ("cosine", "dot")
_NO_DOCUMENT = torch.iinfo(torch.int64).max
_RESCORE_ELEMENTS = 1 << 23  # 64 MiB of float64: the documents gathered at a time to be scored again


def top_k(
    queries: Tensor,
    documents: Tensor,
    k: int,
    *,
    offset: int | None = None,
    similarity: str = "dot",
    group=None,
    query_chunk: int = 1024,
    document_chunk: int = 16384,
) -> tuple[Tensor, Tensor]:
    """The k documents that score highest for each query, best first; equal scores: the lower index first.

    queries: [Q, D] float, the same on every rank. documents: [N, D] float, this rank's share (N may differ, or be 0);
    it may stay in host memory while the queries are on a GPU. offset: global index of this rank's first document; None
    means that the shares follow one another in rank order. similarity: "dot", or "cosine" (a zero vector scores 0).

    Returns (scores [Q, k] float32, indices [Q, k] int64) on the queries' device, the same on every rank, for any split
    and any chunks; min(k, all documents) columns. A score is the float64 product rounded to float32, whatever the input
    dtype. Memory beyond the inputs: about 3 * query_chunk * document_chunk * 4 bytes. No gradient.

    Raises ValueError, on every rank, for what is no float matrix, k < 1, no documents at all, NaN or infinity in an
    embedding, or ranks that disagree on dimension, dtype, k or similarity.
    """
    error = _misuse(queries, documents, k, similarity, query_chunk, document_chunk)
    norms = None
    if error is None:
        with torch.no_grad(), _full_precision(queries.device):
            norms = _norms(documents, document_chunk, queries.device), _norms(queries, document_chunk, queries.device)
            error = _unusable(*norms)
    fields, same = {}, {}
    if error is None:  # else they may not be tensors
        # Documents never travel, so they may be where the group does not communicate: agree on a view without columns.
        fields = {"queries": queries, "documents": documents[:, :0].to(queries.device)}
        same = {"k": k, "similarity": similarity, "number of queries": len(queries), "query_chunk": query_chunk}
    rows = collectives.agree("top_k", fields, group=group, same=same, error=error)["documents"]
    assert norms is not None
    if sum(rows) == 0:
        raise ValueError("top_k: there are no documents on any rank; expected at least one")
    rank = collectives.rank(group)
    shard = _Shard(
        documents=documents,
        norms_N=norms[0],
        offset=sum(rows[:rank]) if offset is None else offset,
        cosine=similarity == "cosine",
        chunk=document_chunk,
    )
    width = min(k, sum(rows))
    found = []
    with torch.no_grad(), _full_precision(queries.device):
        for queries_QD, norms_Q in zip(queries.split(query_chunk), norms[1].split(query_chunk), strict=True):
            local = _pad(*_search_shard(queries_QD, norms_Q, shard, min(k, len(documents))), width)
            found.append(_merge_ranks(*local, width, group))
    if not found:
        return queries.new_empty(0, width, dtype=torch.float32), queries.new_empty(0, width, dtype=torch.int64)
    return torch.cat([scores for scores, _ in found]), torch.cat([indices for _, indices in found])


@dataclass(frozen=True, kw_only=True)
class _Shard:
    documents: Tensor  # [N, D], any float dtype, any device
    norms_N: Tensor  # [N] float64, on the queries' device
    offset: int  # global index of the first document
    cosine: bool
    chunk: int


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


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Float32 products in float32: neither a caller's autocast nor its TF32 setting may touch the ranking."""
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # since torch 2.9
        before = [backend.fp32_precision for backend in _matmul_backends()]
        _set_precision(["ieee"] * len(before))
        restore = partial(_set_precision, before)
    else:
        restore = partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        restore()


def _matmul_backends() -> list[Any]:
    return [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # pyright: ignore[reportAttributeAccessIssue]


def _set_precision(values: list[str]) -> None:
    for backend, value in zip(_matmul_backends(), values, strict=True):
        backend.fp32_precision = value


def _norms(rows_ND: Tensor, chunk: int, device: torch.device) -> Tensor:
    blocks = [block.to(device).double().norm(dim=1) for block in rows_ND.split(chunk)] if len(rows_ND) else []
    return torch.cat(blocks) if blocks else torch.empty(0, dtype=torch.float64, device=device)


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


def _search_shard(queries_QD: Tensor, norms_Q: Tensor, shard: _Shard, k: int) -> tuple[Tensor, Tensor]:
    """The k best of this rank: exact scores [Q, k] and global indices [Q, k], in order."""
    if k == 0:
        empty = queries_QD.new_empty(len(queries_QD), 0)
        return empty.float(), empty.long()
    # How many spare candidates is a matter of speed alone: enough that near-ties seldom reach the boundary.
    kept = min(k + 32 + k // 4, len(shard.documents))
    rough_QK, columns_QK = _candidates(queries_QD, norms_Q, shard, kept)
    scores_QK, columns_QK = _in_order(_rescore(queries_QD, norms_Q, shard, columns_QK), columns_QK)
    scores_Qk, columns_Qk = scores_QK[:, :k], columns_QK[:, :k]
    if kept < len(shard.documents):
        # Everyone dropped has a rough score of at most the lowest kept one, so a true score of at most `ceiling`.
        ceiling_Q = rough_QK.amin(dim=1).double() + _rough_error(norms_Q, shard, queries_QD.shape[1])
        unsure = (ceiling_Q >= scores_Qk[:, -1].double()).nonzero().squeeze(1)
        for some in unsure.split(128) if len(unsure) else ():  # a float64 block and its sort take much more memory
            scores_Qk[some], columns_Qk[some] = _exhaustive(queries_QD[some], norms_Q[some], shard, k)
    return scores_Qk, columns_Qk + shard.offset


def _rough_error(norms_Q: Tensor, shard: _Shard, dimension: int) -> Tensor:
    """Bound [Q] on |rough score - score|. A float32 sum of D products, in any order, is within D * 2^-24 * |q| |d| of
    the true one; twice that, and a little, covers normalisation in float32 and the score's own rounding."""
    bound, denormals = (dimension + 8) * 2.0**-23, dimension * 2.0**-126
    if shard.cosine:
        return torch.full_like(norms_Q, bound)
    return bound * norms_Q * shard.norms_N.max() + denormals


def _inverse(norms: Tensor) -> Tensor:
    return torch.where(norms > 0, norms.reciprocal(), 0.0)


def _candidates(queries_QD: Tensor, norms_Q: Tensor, shard: _Shard, kept: int) -> tuple[Tensor, Tensor]:
    """Rough scores and columns [Q, K] of the documents that do best in float32, in no order."""
    if shard.cosine:
        queries_QD = queries_QD * _inverse(norms_Q)[:, None]
    queries_QD = queries_QD.float()
    best_QK, columns_QK = (
        queries_QD.new_empty(len(queries_QD), 0),
        norms_Q.new_empty(len(norms_Q), 0, dtype=torch.int64),
    )
    for start in range(0, len(shard.documents), shard.chunk):
        block_CD = shard.documents[start : start + shard.chunk].to(queries_QD.device)
        if shard.cosine:
            block_CD = block_CD * _inverse(shard.norms_N[start : start + shard.chunk])[:, None]
        scores_QC = queries_QD @ block_CD.float().T
        scores_QK, within_QK = scores_QC.topk(min(kept, scores_QC.shape[1]), sorted=False)
        best_QK = torch.cat([best_QK, scores_QK], dim=1)
        columns_QK = torch.cat([columns_QK, within_QK + start], dim=1)
        if best_QK.shape[1] > kept:
            best_QK, chosen_QK = best_QK.topk(kept, sorted=False)
            columns_QK = columns_QK.gather(1, chosen_QK)
    return best_QK, columns_QK


def _exact(products: Tensor, query_norms: Tensor, document_norms: Tensor, cosine: bool) -> Tensor:
    """The one definition of a score. Rounding to float32 wipes out the order in which float64 sums were taken."""
    if cosine:
        products = products * _inverse(query_norms * document_norms)
    return products.float()


def _rescore(queries_QD: Tensor, norms_Q: Tensor, shard: _Shard, columns_QK: Tensor) -> Tensor:
    """Exact scores [Q, K] of chosen documents."""
    scores = []
    rows = max(1, _RESCORE_ELEMENTS // (columns_QK.shape[1] * queries_QD.shape[1] or 1))
    for queries, norms, columns in zip(
        queries_QD.split(rows), norms_Q.split(rows), columns_QK.split(rows), strict=True
    ):
        chosen_QKD = shard.documents[columns.to(shard.documents.device)].to(queries.device).double()
        products_QK = torch.einsum("qd,qkd->qk", queries.double(), chosen_QKD)
        scores.append(_exact(products_QK, norms[:, None], shard.norms_N[columns], shard.cosine))
    return torch.cat(scores)


def _exhaustive(queries_QD: Tensor, norms_Q: Tensor, shard: _Shard, k: int) -> tuple[Tensor, Tensor]:
    """The k best by the exact score of every document."""
    queries_QD = queries_QD.double()
    best_Qk = norms_Q.new_empty(len(norms_Q), 0).float()
    columns_Qk = best_Qk.long()
    for start in range(0, len(shard.documents), shard.chunk):
        block_CD = shard.documents[start : start + shard.chunk].to(queries_QD.device).double()
        norms_C = shard.norms_N[start : start + shard.chunk]
        scores_QC = _exact(queries_QD @ block_CD.T, norms_Q[:, None], norms_C, shard.cosine)
        columns_QC = torch.arange(start, start + len(block_CD), device=norms_Q.device).expand_as(scores_QC)
        # Earlier documents stand to the left, so a stable sort keeps the lower index first among equals.
        best, chosen = torch.cat([best_Qk, scores_QC], dim=1).sort(dim=1, descending=True, stable=True)
        best_Qk, columns_Qk = best[:, :k], torch.cat([columns_Qk, columns_QC], dim=1).gather(1, chosen[:, :k])
    return best_Qk, columns_Qk


def _in_order(scores: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Rows by falling score, then by rising index."""
    indices, order = indices.sort(dim=1)
    scores, second = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    return scores, indices.gather(1, second)


def _pad(scores_Qk: Tensor, indices_Qk: Tensor, width: int) -> tuple[Tensor, Tensor]:
    missing = (0, width - scores_Qk.shape[1])
    pad = torch.nn.functional.pad
    return pad(scores_Qk, missing, value=-torch.inf), pad(indices_Qk, missing, value=_NO_DOCUMENT)


def _merge_ranks(scores_Qk: Tensor, indices_Qk: Tensor, width: int, group) -> tuple[Tensor, Tensor]:
    world_size = collectives.world_size(group)
    if world_size == 1:
        return scores_Qk, indices_Qk

    def gathered(local_Qk: Tensor) -> Tensor:
        every = collectives.all_gather(local_Qk.contiguous(), group, rows=[len(local_Qk)] * world_size)
        return every.view(world_size, *local_Qk.shape).transpose(0, 1).reshape(len(local_Qk), -1)

    scores, indices = _in_order(gathered(scores_Qk), gathered(indices_Qk))
    return scores[:, :width], indices[:, :width]
