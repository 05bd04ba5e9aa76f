"""The search by what texts are: one vector each, a matrix, or several each, `Tokens`.

Shapes: Q queries, N documents of this rank, P pairs.
"""

from typing import TypeAlias

import torch
from torch import Tensor

from inbatch import collectives
from inbatch.losses.composed import gathered_texts
from inbatch.losses.max_sim import Tokens
from inbatch.retrieval.max_sim_search import max_sim_pair_scores, max_sim_top_k
from inbatch.retrieval.search import pair_scores, top_k

Embeddings: TypeAlias = Tensor | Tokens
MAX_SIM = "max_sim"


def nearest(queries: Embeddings, documents: Embeddings, k: int, *, similarity: str, **options) -> tuple[Tensor, Tensor]:
    """Return (scores [Q, k], indices [Q, k]) by `top_k` or `max_sim_top_k`, whose options these are."""
    if isinstance(queries, Tokens):
        assert isinstance(documents, Tokens)
        return max_sim_top_k(queries.vectors, queries.lengths, documents.vectors, documents.lengths, k, **options)
    assert isinstance(documents, Tensor)
    return top_k(queries, documents, k, similarity=similarity, **options)


def scores_of_pairs(queries: Embeddings, documents: Embeddings, pairs: Tensor, *, similarity: str) -> Tensor:
    """Return the scores [P] of pairs [P, 2] (row of a query, row of a document here), as `nearest` gives them."""
    if isinstance(queries, Tokens):
        assert isinstance(documents, Tokens)
        return max_sim_pair_scores(queries.vectors, queries.lengths, documents.vectors, documents.lengths, pairs)
    assert isinstance(documents, Tensor)
    return pair_scores(queries, documents, pairs, similarity=similarity)


def counts_by_rank(what: str, texts: Embeddings, device: torch.device, group) -> list[int]:
    """Return how many texts each rank has; ValueError, on every rank, where they differ in kind or dimension."""
    several = isinstance(texts, Tokens)
    vectors, counted = (texts.vectors, texts.lengths) if several else (texts, texts[:, :0])
    same = {"dimension": vectors.shape[1], "dtype": str(vectors.dtype)}
    return collectives.agree(what, {what: counted.to(device)}, group=group, same=same)[what]


def from_all_ranks(what: str, texts: Embeddings, device: torch.device, group) -> Embeddings:
    """Return the texts of all ranks, on the device."""
    if isinstance(texts, Tensor):
        texts = texts.to(device)
        return collectives.all_gather(texts, group, rows=collectives.agree(what, {what: texts}, group=group)[what])
    on_device = Tokens(texts.vectors.to(device), texts.lengths.to(device))
    return gathered_texts(on_device, counts_by_rank(what, texts, device, group), group)
