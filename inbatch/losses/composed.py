"""Losses of several softmaxes: their weighted sum, by autograd, over one gather; and the dense reference.

Shapes: B local queries, M local passages, D dimension.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from inbatch import collectives
from inbatch.losses.gathered import Softmax
from inbatch.losses.objective import terms
from inbatch.losses.reference import reference_loss
from inbatch.losses.softmax import Problem


def composed(queries: Tensor, passages: Tensor, problem: Problem) -> Tensor:
    """Return the weighted sum of the objective's softmaxes, over one gather."""
    everyone = queries
    gather = problem.negatives == "gather" or (problem.negatives == "ring" and problem.kernels is None)
    if gather and len(problem.passage_counts) > 1:
        problem, passages, everyone = _at_hand(queries, passages, problem)
    if problem.kernels is None:
        return _reference(queries, passages, everyone, problem)
    # Gradients of several softmaxes are added up before they are narrowed, once.
    wide = torch.promote_types(problem.dtype, torch.float32)
    rows = queries.to(wide)
    queries, passages, everyone = rows, passages.to(wide), rows if everyone is queries else everyone.to(wide)
    total = None
    for term in terms(problem.objective, queries.shape[1]):
        columns = _prefix(everyone, term.dim) if term.query_columns else None
        rows, candidates = _prefix(queries, term.dim), _prefix(passages, term.dim)
        loss = Softmax.apply(rows, candidates, columns, problem.temperature, problem, term)
        total = loss if total is None else total + loss
        problem = replace(problem, stats=None)  # the first term is counted
    assert total is not None
    return total


def _at_hand(queries: Tensor, passages: Tensor, problem: Problem) -> tuple[Problem, Tensor, Tensor]:
    """Gather all columns, with gradient; return (problem, passages, queries) of one process that holds them."""
    position, group = problem.rank, problem.group
    before, positives = sum(problem.passage_counts[:position]), problem.positives
    if isinstance(positives, slice):
        positives = slice(positives.start + before, positives.stop + before, positives.step)
    else:
        positives = positives + before
    packed = problem.passage_keys.packed()
    found = replace(
        problem,
        negatives="local",
        positives=positives,
        passage_keys=problem.passage_keys.like(
            None if packed is None else collectives.gather_rows(packed, problem.passage_counts, group)
        ),
    )
    passages = collectives.all_gather(passages, group, rows=problem.passage_counts)
    if not any(term.query_columns for term in terms(problem.objective, queries.shape[1])):
        return found, passages, queries
    packed = problem.query_keys.packed()
    keys = problem.query_keys.like(
        None if packed is None else collectives.gather_rows(packed, problem.query_counts, group)
    )
    everyone = collectives.all_gather(queries, group, rows=problem.query_counts)
    return replace(found, query_keys=keys, first_query=sum(problem.query_counts[:position])), passages, everyone


def _prefix(embeddings: Tensor, dim: int) -> Tensor:
    """Return the first `dim` dimensions, renormalised; the full dimension unchanged. Differentiable."""
    if dim == embeddings.shape[1]:
        return embeddings
    return F.normalize(embeddings[:, :dim], dim=1)


def _reference(queries: Tensor, passages: Tensor, everyone: Tensor, problem: Problem) -> Tensor:
    """Give the specification what it asks for: plain tensors."""
    temperature, device, count = problem.temperature, queries.device, len(queries)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(device, torch.promote_types(queries.dtype, torch.float32))
    own_query = torch.arange(problem.first_query, problem.first_query + count, device=device)
    own_passage = problem.positives
    if isinstance(own_passage, slice):
        own_passage = torch.arange(own_passage.start, own_passage.stop, own_passage.step, device=device)
    softmaxes = terms(problem.objective, queries.shape[1])
    loss, counts_B2 = reference_loss(
        queries,
        passages[problem.positives],
        columns={"passage": passages, "query": everyone},
        own={"passage": own_passage, "query": own_query},
        row_keys=problem.row_keys,
        column_keys={"passage": problem.passage_keys, "query": problem.query_keys},
        temperature=temperature,
        margin=problem.false_negatives.margin,
        terms=[(term.dim, term.directions, term.weight * problem.row_weight) for term in softmaxes],
        weights_B=problem.weights,
        rules_B=problem.rules,
        hardness=problem.objective.hardness,
    )
    if problem.stats is not None:
        others = sum(len(everyone if each.endswith("query") else passages) - 1 for each in softmaxes[0].directions)
        problem.stats.add(counts_B2, others, problem.group)
    return loss
