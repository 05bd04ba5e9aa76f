"""Loss and gradients of a Problem: the autograd function, and the solver for columns that are all at hand.

Shapes: B local queries (rows), M local passages, D dimension, r rows of one chunk, C columns.

The gradient is made during the forward pass: exp(score - positive's score) is written once for a chunk of rows; its
sums make the loss, and two products of the same chunk the gradients (see `blocks`). Nothing of size B x N is kept,
and the backward pass neither computes nor communicates.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from inbatch.losses import ring
from inbatch.losses.blocks import Block, accumulator_dtype, refuse_second_derivatives
from inbatch.losses.overlap import Piece, Scatter, gather_pieces
from inbatch.losses.problem import (
    Problem,
    Step,
    add_prefix_gradient,
    chunks,
    constant,
    rows_of,
    schedule,
)
from inbatch.losses.rows import Rows, Wanted, empty_column_gradients, make_rows

Work = list[list[tuple[Step, Block]]]  # by piece, the blocks of one softmax


class InfoNCE(torch.autograd.Function):
    """(queries, passages, temperature, problem) -> loss. The temperature is a 0-d tensor or a float."""

    @staticmethod
    def forward(ctx, queries: Tensor, passages: Tensor, temperature: Tensor | float, problem: Problem) -> Tensor:
        wanted = Wanted(
            queries=ctx.needs_input_grad[0], passages=ctx.needs_input_grad[1], temperature=ctx.needs_input_grad[2]
        )
        queries, passages = rows_of(queries), rows_of(passages)
        # Kernels run on the current device, not on that of their arguments.
        device = torch.cuda.device(queries.device if queries.is_cuda else -1)
        with torch.autocast(queries.device.type, enabled=False), device:
            loss, gradients, coefficient_B = _solve(queries, passages, temperature, problem, wanted)
        ctx.problem = problem
        ctx.dtypes = queries.dtype, passages.dtype, getattr(temperature, "dtype", None)
        if coefficient_B is None:
            ctx.save_for_backward(*gradients)
        else:
            ctx.save_for_backward(*gradients, queries, passages, coefficient_B)
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):
        refuse_second_derivatives()
        saved = ctx.saved_tensors  # once: checkpointing unpacks a tensor a single time
        if len(saved) > 3:
            d_queries, d_passages, _, queries, passages, coefficient_B = saved
            close, stride = ctx.problem.kernels.close, ctx.problem.stride
            return *close(queries, passages, stride, coefficient_B, d_queries, d_passages, grad), None, None
        gradients = zip(saved, ctx.dtypes, strict=True)
        return *(None if each is None else (each * grad).to(dtype) for each, dtype in gradients), None


def _solve(
    queries: Tensor, passages: Tensor, temperature: Tensor | float, problem: Problem, wanted: Wanted
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None], Tensor | None]:
    """The loss; the gradients; and None, or what the kernels need to add the positive term in the backward pass."""
    dtype = accumulator_dtype(queries.dtype)
    if isinstance(temperature, Tensor):
        scale = temperature.detach().to(queries.device, dtype).reciprocal()
    else:
        scale = constant(1 / temperature, dtype, queries.device)
    positives = problem.positives_of(passages)
    all_rows = make_rows(queries, positives, problem, wanted, scale)
    solve = ring.solve if problem.negatives == "ring" and len(problem.query_counts) > 1 else _solve_gathered
    d_query_columns, d_passages = solve(queries, passages, problem, wanted, all_rows)

    if d_query_columns is None and d_passages is not None and _can_wait(queries, problem, wanted, all_rows):
        only = all_rows[0]
        return only.loss, (only.gradients["query"], d_passages, None), only.coefficient_B

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
    return loss, (_narrow(d_queries, queries), _narrow(d_passages, passages), d_temperature), None


def _can_wait(queries: Tensor, problem: Problem, wanted: Wanted, all_rows: list[Rows]) -> bool:
    """Whether the positive term, the loss's gradient and the narrowing can be one pass over the gradients, backward."""
    return (
        hasattr(problem.kernels, "close")
        and problem.stride is not None
        and wanted.queries
        and wanted.passages
        and not wanted.temperature
        and [rows.queries.shape for rows in all_rows] == [queries.shape]
        and list(all_rows[0].gradients) == ["query"]
    )


def _narrow(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    """In the dtype of the input; float16 waits for the backward pass, whose loss scale keeps it from underflowing."""
    return gradient if gradient is None or like.dtype == torch.float16 else gradient.to(like.dtype)


def _solve_gathered(
    queries: Tensor, passages: Tensor, problem: Problem, wanted: Wanted, all_rows: list[Rows]
) -> tuple[Tensor | None, Tensor | None]:
    """Adds to all_rows; returns this rank's share of the gradients of the columns: of queries, of passages."""
    gathered = _Gathered(gather_pieces(queries, passages, problem), problem, wanted)
    for rows in all_rows:
        gathered.solve(rows, first=rows is all_rows[0], last=rows is all_rows[-1])
    return gathered.scatter.result("query"), gathered.scatter.result("passage")


class _Gathered:
    """Rows against all columns, which come in pieces."""

    def __init__(self, pieces: list[Piece], problem: Problem, wanted: Wanted):
        self.pieces, self.problem, self.wanted = pieces, problem, wanted
        self.scatter = Scatter(problem, len(pieces))
        self.totals: dict[tuple[str, int], Tensor] = {}

    def solve(self, rows: Rows, *, first: bool, last: bool) -> None:
        """Adds the softmaxes of one prefix to `rows`, and the gradients of the columns to `scatter` after the last."""
        columns = [piece.columns.prefix(rows.queries.shape[1]) for piece in self.pieces]
        gradients = [empty_column_gradients(self.problem, self.wanted, each) for each in columns]
        softmaxes = schedule(self.problem.objective)
        for steps, weight in softmaxes:
            counts = None
            if first and self.problem.stats is not None and steps is softmaxes[0][0]:
                counts = torch.zeros(rows.score_B.shape[0], 2, dtype=torch.int32, device=rows.score_B.device)
            work = [
                [(step, rows.block(step, each, piece.keys[step.direction])) for step in steps if each.has(step.column)]
                for piece, each in zip(self.pieces, columns, strict=True)
            ]
            width = sum(block.columns.shape[0] for blocks in work for _, block in blocks)
            ranges = chunks(rows.score_B.shape[0], width, rows.queries.dtype, self.problem)
            factor, losses, coefficients = rows.factor(weight), [], []
            for start, stop in ranges:
                found, loss_r, weights, coefficient_r = self._exponentials(rows, work, start, stop, factor, counts)
                losses.append(loss_r)
                coefficients.append(coefficient_r)
                if self.wanted.any:
                    done = steps is softmaxes[-1][0] and stop == ranges[-1][1]
                    self._add_gradients(rows, work, found, weights, gradients, start, stop, last=last and done)
                del found
            rows.add(_join(losses, rows.score_B), _join(coefficients, rows.score_B), weight)
            if self.problem.stats is not None and counts is not None:
                self.problem.stats.add(counts, width - len(steps), self.problem.group)
        for number in range(len(self.pieces)):
            self._complete(number, gradients[number], last=last)  # what no row was left to complete

    def _exponentials(self, rows: Rows, work: Work, start: int, stop: int, factor: Tensor, counts: Tensor | None):
        """(exponentials by block, loss, weights by block, coefficient) of a chunk of rows."""
        score_r, results = rows.score_B[start:stop], []
        for piece, blocks in zip(self.pieces, work, strict=True):
            piece.ready()
            for _, block in blocks:
                results.append(
                    self.problem.kernels.exp_scores(block, start, stop, score_r, keep=self.wanted.any, counts=counts)
                )
        found, sums, pivots = zip(*results, strict=True)
        return found, *self.problem.kernels.finish(sums, pivots, score_r, factor)

    def _add_gradients(
        self,
        rows: Rows,
        work: Work,
        found,
        weights,
        gradients: list[dict[str, Tensor]],
        start: int,
        stop: int,
        *,
        last: bool,
    ) -> None:
        """First those of the columns, each piece leaving for its owners as soon as it is complete; then the rows'."""
        add, chunk = self.problem.kernels.add_gradients, iter(zip(found, weights, strict=True))
        together = len(self.pieces) == 1  # nothing to leave early: one call, which makes fewer launches
        rows_later = []
        for number, blocks in enumerate(work):
            for step, block in blocks:
                exp_rC, weight_r = next(chunk)
                d_columns, fresh = gradients[number].get(step.column), step.first_column and start == 0
                d_rows, fresh_rows = rows.gradients.get(step.row), step.first_row and number == 0
                now = d_rows if together else None
                if d_columns is not None or now is not None:
                    add(
                        block, exp_rC, start, stop, weight_r, now, d_columns, fresh_rows=fresh_rows, fresh_columns=fresh
                    )
                if d_rows is not None and not together:
                    rows_later.append((block, exp_rC, weight_r, d_rows, fresh_rows))
            if last:
                self._complete(number, gradients[number], last=True)
        for block, exp_rC, weight_r, d_rows, fresh in rows_later:
            add(block, exp_rC, start, stop, weight_r, d_rows, None, fresh_rows=fresh, fresh_columns=False)

    def _complete(self, number: int, gradients: dict[str, Tensor], *, last: bool) -> None:
        """Empties the gradients of one prefix's columns into the total; after the last prefix it goes to the owners."""
        for kind in list(gradients):
            total = self.totals.pop((kind, number), None)
            total = add_prefix_gradient(total, gradients.pop(kind), self.pieces[number].columns.of(kind))
            if last:
                self.scatter.add(kind, number, total)
            else:
                self.totals[kind, number] = total


def _join(parts: list[Tensor], like: Tensor) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else torch.zeros_like(like)
