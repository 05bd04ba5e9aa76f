"""The records of the data side: examples, training batches, retrieval sets."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Passage:
    """A document: its text, its title ("" if none) and its id within its corpus (None if the record has none)."""

    text: str
    title: str = ""
    doc_id: str | None = None

    @property
    def full_text(self) -> str:
        """Return what is encoded: title and text joined by a space, as BEIR does; either where the other is empty."""
        return f"{self.title} {self.text}".strip() if self.title else self.text


@dataclass(frozen=True, kw_only=True)
class Example:
    """One query with its known positives (at least one) and its hard negatives (possibly none).

    ``corpus`` names what the ids belong to: equal ids of two corpora are different documents. ``query_prefix`` and
    ``passage_prefix`` are the data's instructions, which replace the collator's; None if the data has none.
    ``scores`` are a teacher's, of the positives and then of the negatives; empty if the record has none.
    ``left_out`` counts the negatives that were dropped because they equal a positive.
    """

    query: str
    query_id: str | None = None
    positives: tuple[Passage, ...]
    negatives: tuple[Passage, ...] = ()
    corpus: str = ""
    query_prefix: str | None = None
    passage_prefix: str | None = None
    scores: tuple[float, ...] = ()
    left_out: int = field(default=0, compare=False)


@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """One rank's share of a global batch; B queries, M passages, either may be 0.

    Attributes:
        queries: tokenized queries, tensors ``[B, T]``.
        passages: tokenized passages, tensors ``[M, T]``; those of a query are contiguous, its positive first.
        positives: ``[B]`` int64, the column in ``passages`` of each query's positive.
        query_ids: ``[B]`` int64.
        passage_ids: ``[M]`` int64.
        positive_ids: ``[B, K]`` int64, every known positive of each query, padded with -1; K >= 1.
        candidates, mask_own_negatives: ``[B]`` int64 and bool, as in ``FalseNegatives``; None where all are usual.
        weights: ``[B]`` float32, of the queries' losses; None where all are 1.
        teacher_scores: ``[B, G]`` float32, of each query's passages in their order, NaN where there is no score; None
            where nobody asked for them.
    """

    queries: dict[str, Tensor]
    passages: dict[str, Tensor]
    positives: Tensor
    query_ids: Tensor
    passage_ids: Tensor
    positive_ids: Tensor
    candidates: Tensor | None = None
    mask_own_negatives: Tensor | None = None
    weights: Tensor | None = None
    teacher_scores: Tensor | None = None

    @property
    def regular(self) -> bool:
        """True if all queries have equally many passages, so that ``positives`` says nothing. Reads it."""
        num_queries, num_passages = len(self.positives), len(self.passage_ids)
        if num_queries == 0 or num_passages % num_queries:
            return False
        return torch.equal(self.positives, torch.arange(num_queries) * (num_passages // num_queries))


@dataclass(frozen=True, kw_only=True)
class RetrievalData:
    """A retrieval test set: queries, the whole corpus, and the judgements.

    ``documents[i]`` (title and text joined) belongs to ``doc_ids[i]`` and is read from disk on access;
    ``queries[i]`` belongs to ``query_ids[i]``; ``qrels[query_id][doc_id]`` is the grade, 0 or less is not relevant.
    """

    query_ids: list[str]
    queries: list[str]
    doc_ids: list[str]
    documents: Sequence[str]
    qrels: dict[str, dict[str, int]]
