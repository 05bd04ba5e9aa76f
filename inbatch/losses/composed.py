"""Losses that autograd composes, over one gather: several softmaxes, several vectors a text, and the dense reference.

Shapes: B local queries, M local passages, N passages of all ranks, D dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from inbatch import collectives
from inbatch.losses import tiled
from inbatch.losses.gathered import Softmax, gathered_keys
from inbatch.losses.max_sim import Spans, Tokens, in_place, max_sim, packed, prefix, ring_max_sim
from inbatch.losses.objective import terms
from inbatch.losses.reference import dense_loss, dot_products, max_similarities
from inbatch.losses.softmax import Problem


def composed(queries: Tensor, passages: Tensor, problem: Problem) -> Tensor:
    """Return the weighted sum of the objective's softmaxes, over one gather."""
    everyone, softmaxes = queries, terms(problem.objective, queries.shape[1])
    if _gathers(problem):
        query_columns = any(term.query_columns for term in softmaxes)
        passages = collectives.all_gather(passages, problem.group, rows=problem.passage_counts)
        if query_columns:
            everyone = collectives.all_gather(queries, problem.group, rows=problem.query_counts)
        problem = _at_hand(problem, query_columns=query_columns)
    if problem.kernels is None:
        positives, columns = passages[problem.positives], {"passage": passages, "query": everyone}
        return _dense(
            [(*dot_products(queries, positives, columns, t.dim, t.directions), t.weight) for t in softmaxes], problem
        )
    # Gradients of several softmaxes are added up before they are narrowed, once.
    wide = torch.promote_types(problem.dtype, torch.float32)
    rows = queries.to(wide)
    queries, passages, everyone = rows, passages.to(wide), rows if everyone is queries else everyone.to(wide)
    total = None
    for term in softmaxes:
        columns = prefix(everyone, term.dim) if term.query_columns else None
        rows, candidates = prefix(queries, term.dim), prefix(passages, term.dim)
        loss = Softmax.apply(rows, candidates, columns, problem.temperature, problem, term)
        total = loss if total is None else total + loss
        problem = replace(problem, stats=None)  # the first term is counted
    assert total is not None
    return total


def multi_vector(queries_BTD: Tensor, passages_MTD: Tensor, spans: Sequence[Spans], problem: Problem) -> Tensor:
    """Return the loss of texts of several vectors, whose scores alone, [B, N], are held whole.

    Only real tokens travel; passages that stay are read in place. The softmax over the scores is the reference's: the
    scores are a small part of the grid.
    """
    softmaxes, group = terms(problem.objective, queries_BTD.shape[2]), problem.group
    travels = problem.negatives == "ring" and problem.kernels is not None and len(problem.passage_counts) > 1
    gathers = _gathers(problem) and not travels
    query_columns = any(term.query_columns for term in softmaxes)
    stays = problem.kernels is not None and not (gathers or travels or query_columns)
    queries, passages = packed(queries_BTD, spans[0]), (in_place if stays else packed)(passages_MTD, spans[1])
    options: dict[str, Any] = {"mean": problem.token_reduction == "mean", "chunk_mib": problem.chunk_mib}
    options["fused"] = problem.kernels is not tiled
    everyone, positives = queries, passages[problem.positives] if query_columns else passages
    lengths = lengths_by_rank(passages, problem.passage_counts, group) if travels else []
    if gathers or travels:
        problem = _at_hand(problem, query_columns=query_columns)
    if gathers:
        passages = gathered_texts(passages, problem.passage_counts, group)
        everyone = gathered_texts(queries, problem.query_counts, group) if query_columns else queries

    def scores(rows: Tokens, columns: Tokens) -> Tensor:
        if problem.kernels is None:
            if not len(rows.lengths) or not len(columns.lengths):  # with gradient: others wait for the backward pass
                nothing = rows.vectors.new_zeros(len(rows.lengths), len(columns.lengths))
                return nothing * (rows.vectors.sum() + columns.vectors.sum())
            texts = (side.vectors.split(side.lengths.tolist()) for side in (rows, columns))
            return max_similarities(*texts, mean=options["mean"])
        if travels:
            return ring_max_sim(rows, columns, lengths, problem.rank, group, **options)
        return max_sim(rows, columns, **options)

    parts = []
    for term in softmaxes:
        rows, similarities = queries.prefix(term.dim), {}
        for direction in term.directions:
            if direction == "query_to_passage":
                similarities[direction] = scores(rows, passages.prefix(term.dim))
            else:
                similarities[direction] = scores(everyone.prefix(term.dim), positives.prefix(term.dim)).T
        direction, similarity_BC = next(iter(similarities.items()))
        if problem.unmasked and term.plain and len(softmaxes) == 1 and len(similarity_BC):
            # The same formula in few launches: small batches wait for nothing else.
            place_B = _places(problem, len(similarity_BC), similarity_BC.device)["passage"]
            loss = F.cross_entropy(similarity_BC / _temperature(problem, similarity_BC), place_B, reduction="sum")
            return loss * (term.weight * problem.row_weight)
        place_B1 = _places(problem, len(queries.lengths), similarity_BC.device)[direction.split("_to_")[1]][:, None]
        parts.append((similarity_BC.gather(1, place_B1), similarities, term.weight))
    return _dense(parts, problem)


def _gathers(problem: Problem) -> bool:
    gather = problem.negatives == "gather" or (problem.negatives == "ring" and problem.kernels is None)
    return gather and len(problem.passage_counts) > 1


def _at_hand(problem: Problem, *, query_columns: bool) -> Problem:
    """Return the problem of one process that holds the columns of all ranks, whose keys are gathered here."""
    before, positives = sum(problem.passage_counts[: problem.rank]), problem.positives
    if isinstance(positives, slice):
        positives = slice(positives.start + before, positives.stop + before, positives.step)
    else:
        positives = positives + before
    passage_keys = gathered_keys(problem.passage_keys, problem.passage_counts, problem.group)
    local = replace(problem, negatives="local", positives=positives, passage_keys=passage_keys)
    if not query_columns:
        return local
    query_keys = gathered_keys(problem.query_keys, problem.query_counts, problem.group)
    return replace(local, query_keys=query_keys, first_query=sum(problem.query_counts[: problem.rank]))


def _places(problem: Problem, num_rows: int, device: torch.device) -> dict[str, Tensor]:
    """Return the place of each row's positive among the passages at hand, and of the row among the queries, [B]."""
    passage = problem.positives
    if isinstance(passage, slice):
        passage = torch.arange(passage.start, passage.stop, passage.step, device=device)
    return {
        "passage": passage,
        "query": torch.arange(problem.first_query, problem.first_query + num_rows, device=device),
    }


def _temperature(problem: Problem, like: Tensor) -> float | Tensor:
    given = problem.temperature
    return given.to(like.device, like.dtype) if isinstance(given, Tensor) else given


def _dense(softmaxes: Sequence[tuple[Tensor, Mapping[str, Tensor], float]], problem: Problem) -> Tensor:
    """Return `dense_loss`, the specification, for these softmaxes (its terms), and count its first one."""
    similarity_B1, first, _ = softmaxes[0]
    loss, counts_B2 = dense_loss(
        [(positive_B1, others, weight * problem.row_weight) for positive_B1, others, weight in softmaxes],
        places=_places(problem, len(similarity_B1), similarity_B1.device),
        row_keys=problem.row_keys,
        column_keys={"passage": problem.passage_keys, "query": problem.query_keys},
        temperature=_temperature(problem, similarity_B1),
        margin=problem.false_negatives.margin,
        weights_B=problem.weights,
        rules_B=problem.rules,
        hardness=problem.objective.hardness,
    )
    if problem.stats is not None:
        problem.stats.add(counts_B2, sum(others.shape[1] - 1 for others in first.values()), problem.group)
    return loss


# ---- several vectors a text


def lengths_by_rank(texts: Tokens, counts: list[int], group: ProcessGroup | None) -> list[Tensor]:
    """Return the lengths of the texts of each rank; counts: of the texts, by rank."""
    return list(collectives.gather_rows(texts.lengths, counts, group).split(counts))


def gathered_texts(texts: Tokens, counts: list[int], group: ProcessGroup | None) -> Tokens:
    """Return the texts of all ranks, with gradient; only real tokens travel. counts: of the texts, by rank."""
    lengths = lengths_by_rank(texts, counts, group)
    tokens = torch.stack([of_rank.sum() for of_rank in lengths]).tolist()
    return Tokens(collectives.all_gather(texts.vectors, group, rows=tokens), torch.cat(lengths))
