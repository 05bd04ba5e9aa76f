"""Loss and gradients of a Problem: the autograd function, and the solver for columns that are all at hand.

Shapes: B local queries (rows), M local passages, D dimension, r rows of one chunk, C columns.

The gradient is made during the forward pass: exp(score - positive's score) is written once for a chunk of rows; its
sums make the loss, and two products of the same chunk the gradients (see `_blocks`). Nothing of size B x N is kept,
and the backward pass neither computes nor communicates.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from inbatch import collectives
from inbatch.losses import ring
from inbatch.losses._blocks import accumulator_dtype
from inbatch.losses._problem import (
    Columns,
    MatchedKeys,
    Problem,
    add_prefix_gradient,
    chunks,
    constant,
    gather_columns,
    match_all,
    schedule,
)
from inbatch.losses._rows import Rows, Wanted, empty_column_gradients, make_rows


class InfoNCE(torch.autograd.Function):
    """(queries, passages, temperature, problem) -> loss. The temperature is a 0-d tensor or a float."""

    @staticmethod
    def forward(ctx, queries: Tensor, passages: Tensor, temperature: Tensor | float, problem: Problem) -> Tensor:
        wanted = Wanted(
            queries=ctx.needs_input_grad[0], passages=ctx.needs_input_grad[1], temperature=ctx.needs_input_grad[2]
        )
        with torch.autocast(queries.device.type, enabled=False):
            loss, gradients = _solve(queries, passages, temperature, problem, wanted)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = queries.dtype, passages.dtype, getattr(temperature, "dtype", None)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if saved is None else (saved * grad).to(dtype) for saved, dtype in gradients), None


def _solve(
    queries: Tensor, passages: Tensor, temperature: Tensor | float, problem: Problem, wanted: Wanted
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    dtype = accumulator_dtype(queries.dtype)
    if isinstance(temperature, Tensor):
        scale = temperature.detach().to(queries.device, dtype).reciprocal()
    else:
        scale = constant(1 / temperature, dtype, queries.device)
    positives = problem.positives_of(passages)
    all_rows = make_rows(queries, positives, problem, wanted, scale)
    solve = ring.solve if problem.negatives == "ring" and len(problem.query_counts) > 1 else _solve_gathered
    d_query_columns, d_passages = solve(queries, passages, problem, wanted, all_rows)

    d_queries, d_positives, d_temperature = d_query_columns, None, None
    for rows in all_rows:
        to_queries, to_positives, to_scores = rows.close()
        if wanted.queries and to_queries is not None:
            d_queries = add_prefix_gradient(d_queries, to_queries, queries)
        if wanted.passages and to_positives is not None:
            d_positives = add_prefix_gradient(d_positives, to_positives, positives)
        if to_scores is not None:
            d_temperature = -to_scores * scale if d_temperature is None else d_temperature - to_scores * scale
    if d_positives is not None:
        if d_passages is None:  # passages are positives but no columns
            d_passages = torch.zeros_like(passages, dtype=dtype)
        problem.add_to_positives(d_passages, d_positives)
    if isinstance(temperature, Tensor) and d_temperature is not None:
        d_temperature = d_temperature.to(temperature.device)
    loss = reduce(torch.add, [rows.loss for rows in all_rows])
    return loss, (_narrow(d_queries, queries), _narrow(d_passages, passages), d_temperature)


def _narrow(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    """In the dtype of the input; float16 waits for the backward pass, whose loss scale keeps it from underflowing."""
    return gradient if gradient is None or like.dtype == torch.float16 else gradient.to(like.dtype)


def _solve_gathered(
    queries: Tensor, passages: Tensor, problem: Problem, wanted: Wanted, all_rows: list[Rows]
) -> tuple[Tensor | None, Tensor | None]:
    """Adds to all_rows; returns this rank's share of the gradients of the columns: of queries, of passages."""
    columns = gather_columns(queries, passages, problem)
    keys = match_all(problem, columns)
    totals: dict[str, Tensor | None] = {"query": None, "passage": None}
    for rows in all_rows:
        counts = None
        if problem.stats is not None and rows is all_rows[0]:
            counts = torch.zeros(rows.score_B.shape[0], 2, dtype=torch.int32, device=queries.device)
        gradients = _solve_prefix(rows, columns.prefix(rows.queries.shape[1]), keys, problem, wanted, counts)
        for kind in list(gradients):
            totals[kind] = add_prefix_gradient(totals[kind], gradients.pop(kind), columns.of(kind))
    if problem.negatives == "local" or len(problem.query_counts) == 1:
        return totals["query"], totals["passage"]
    for kind, total in totals.items():
        if total is not None:
            totals[kind] = collectives.reduce_scatter_rows(total, problem.column_counts(kind), problem.group)
    return totals["query"], totals["passage"]


def _solve_prefix(
    rows: Rows, columns: Columns, keys: MatchedKeys, problem: Problem, wanted: Wanted, counts: Tensor | None
) -> dict[str, Tensor]:
    """Adds every softmax of one prefix to `rows`; returns the gradients of the columns by kind."""
    kernels = problem.kernels
    gradients = empty_column_gradients(problem, wanted, columns)
    for steps, weight in schedule(problem.objective):
        blocks = [rows.block(step, columns, keys[step.direction]) for step in steps]
        widths = [block.columns.shape[0] for block in blocks]
        factor, losses, coefficients = rows.factor(weight), [], []
        for start, stop in chunks(rows.score_B.shape[0], sum(widths), columns.passages.dtype, problem):
            score_r = rows.score_B[start:stop]
            found = [
                kernels.exp_scores(block, start, stop, score_r, keep=wanted.any, counts=counts) for block in blocks
            ]
            sums, pivots = [each[1] for each in found], [each[2] for each in found]
            loss_r, weights, coefficient_r = kernels.finish(sums, pivots, score_r, factor)
            losses.append(loss_r)
            coefficients.append(coefficient_r)
            exponentials = [each[0] for each in found]
            del found
            for block, step, weight_r in zip(blocks, steps, weights, strict=True):
                exp_rC = exponentials.pop(0)
                if exp_rC is not None:
                    kernels.add_gradients(
                        block,
                        exp_rC,
                        start,
                        stop,
                        weight_r,
                        rows.gradients.get(step.row),
                        gradients.get(step.column),
                        fresh_rows=step.first_row,
                        fresh_columns=step.first_column and start == 0,
                    )
                del exp_rC
        rows.add(_join(losses, rows.score_B), _join(coefficients, rows.score_B), weight)
        if problem.stats is not None and counts is not None:
            problem.stats.add(counts, sum(widths) - len(widths), problem.group)
            counts = None
    return gradients


def _join(parts: list[Tensor], like: Tensor) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else torch.zeros_like(like)
