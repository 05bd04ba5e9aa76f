"""The dense formula, as one would write it on paper: the specification that every other path is tested against.

Shapes: B local queries (rows), M local passages, C columns of any kind, D dimension of a prefix.

    s(a, b) = a . b / temperature
    l_i     = log( exp s(q_i, d_i) + sum over directions and columns j in C(i) of exp s(row_i, column_j) ) - s(q_i, d_i)
    loss    = (world size) * sum_i l_i / (rows of all ranks)

C(i) leaves out the row's own column and its false negatives. Autograd does the rest, the gather's gradient being a sum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inbatch.losses.blocks import accumulator_dtype
from inbatch.losses.masking import mask
from inbatch.losses.objective import DIRECTIONS
from inbatch.losses.problem import Columns, Problem, gather_columns, keys_of_rows, prefix


def reference_loss(queries: Tensor, passages: Tensor, temperature: Tensor | float, problem: Problem) -> Tensor:
    """0-d loss of this rank, float32 (float64 for float64 inputs); holds all scores in memory."""
    with torch.autocast(queries.device.type, enabled=False):
        dtype = accumulator_dtype(queries.dtype)
        if isinstance(temperature, Tensor):
            temperature = temperature.to(queries.device, dtype)
        positives, columns = problem.positives_of(passages), gather_columns(queries, passages, problem)
        total = torch.zeros((), dtype=dtype, device=queries.device)
        count = problem.stats is not None
        for dim, prefix_weight in problem.objective.prefixes(queries.shape[1]):
            rows = {"query": prefix(queries, dim).to(dtype), "positive": prefix(positives, dim).to(dtype)}
            for directions, weight in problem.objective.softmaxes():
                losses_B = _softmax_losses(rows, columns.prefix(dim), directions, temperature, problem, count)
                total = total + losses_B.sum() * (prefix_weight * weight * problem.row_weight)
                count = False
        return total


def _softmax_losses(
    rows: dict[str, Tensor],
    columns: Columns,
    directions: tuple[str, ...],
    temperature: Tensor | float,
    problem: Problem,
    count: bool,
) -> Tensor:
    """l_i of one softmax [B]."""
    similarity_B1 = (rows["query"] * rows["positive"]).sum(1, keepdim=True)
    candidates = [similarity_B1 / temperature]
    counts_B2 = torch.zeros(len(similarity_B1), 2, dtype=torch.int64, device=similarity_B1.device)
    for direction in directions:
        row, column = DIRECTIONS[direction]
        similarity_BC = rows[row] @ columns.of(column).to(similarity_B1.dtype).T
        masked_BC = mask(
            keys_of_rows(problem.row_keys, direction),
            columns.keys(column),
            *similarity_BC.shape,
            device=similarity_BC.device,
        )
        if problem.margin is not None:
            masked_BC |= similarity_BC.detach() > similarity_B1.detach() + problem.margin
        own_BC = columns.own(column)[:, None] == torch.arange(similarity_BC.shape[1], device=similarity_BC.device)
        masked_BC &= ~own_BC
        # Divided first, filled last: no -inf meets the temperature, whose gradient would be 0 * inf.
        scores_BC = (similarity_BC / temperature).masked_fill(masked_BC | own_BC, -math.inf)
        candidates.append(scores_BC)
        counts_B2[:, 0] += masked_BC.sum(1)
        counts_B2[:, 1] += (scores_BC > candidates[0]).sum(1)
    if count and problem.stats is not None:
        problem.stats.add(counts_B2, sum(each.shape[1] - 1 for each in candidates[1:]), problem.group)
    return torch.logsumexp(torch.cat(candidates, dim=1), dim=1) - candidates[0][:, 0]
