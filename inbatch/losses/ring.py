"""negatives="ring": no rank ever holds all columns. Blocks travel from rank to rank while the previous block computes.

Shapes: W world size, B local queries (rows), M local passages, D dimension, r rows of a chunk, C columns of a block.

Two sweeps of W hops. The first needs only the sums of every softmax. The second makes the gradients; those of a block's
columns travel one hop behind the block, every rank adding its rows' share, and arrive at the block's owner complete.
Scores are made twice (8 B N D operations instead of 6), and memory holds a few blocks whatever W is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from inbatch import collectives
from inbatch.losses.blocks import Block
from inbatch.losses.masking import Keys
from inbatch.losses.problem import (
    Columns,
    MatchedKeys,
    Problem,
    Step,
    add_prefix_gradient,
    chunks,
    match_all,
    own_column,
    schedule,
)
from inbatch.losses.rows import Rows, Wanted, empty_column_gradients


def solve(
    queries: Tensor, passages: Tensor, problem: Problem, wanted: Wanted, all_rows: list[Rows]
) -> tuple[Tensor | None, Tensor | None]:
    """Adds to all_rows; returns the gradients of this rank's columns: of queries, of passages."""
    counts = None
    if problem.stats is not None:
        counts = torch.zeros(queries.shape[0], 2, dtype=torch.int32, device=queries.device)
    softmaxes = [_PrefixSoftmaxes(rows, problem) for rows in all_rows]
    for _, columns in _blocks(queries, passages, problem):
        keys = match_all(problem, columns)
        for each in softmaxes:
            each.add_sums(columns, keys, counts if each is softmaxes[0] else None)
    if problem.stats is not None and counts is not None:
        others = sum(sum(problem.column_counts(step.column)) - 1 for step in schedule(problem.objective)[0][0])
        problem.stats.add(counts, others, problem.group)
    for each in softmaxes:
        each.finish()
    if not wanted.any:
        return None, None
    return _gradient_sweep(queries, passages, problem, wanted, softmaxes)


def _gradient_sweep(
    queries: Tensor, passages: Tensor, problem: Problem, wanted: Wanted, softmaxes: list[_PrefixSoftmaxes]
) -> tuple[Tensor | None, Tensor | None]:
    shifts: dict[str, collectives.RingShift] = {}
    for hop, columns in _blocks(queries, passages, problem):
        keys = match_all(problem, columns)
        found: dict[str, Tensor | None] = {}
        for each in softmaxes:
            gradients = each.add_gradients(columns, keys, wanted, first_hop=hop == 0)
            for kind in list(gradients):
                found[kind] = add_prefix_gradient(found.get(kind), gradients.pop(kind), columns.of(kind))
        for kind, gradient in found.items():
            assert gradient is not None
            if hop > 0:
                gradient += shifts[kind].wait()[0]
            shifts[kind] = collectives.ring_shift([gradient], _held(problem, kind, hop), problem.group)
    arrived = {kind: shift.wait()[0] for kind, shift in shifts.items()}
    return arrived.get("query"), arrived.get("passage")


def _blocks(queries: Tensor, passages: Tensor, problem: Problem) -> Iterator[tuple[int, Columns]]:
    """(hop, columns of the rank that many places before this one), the next block being on its way meanwhile."""
    travelling = {"passage": (passages, problem.passage_keys.packed())}
    if problem.objective.query_columns:
        travelling["query"] = (queries, problem.row_keys.packed())
    hops = len(problem.passage_counts)
    held = {kind: [tensor for tensor in pair if tensor is not None] for kind, pair in travelling.items()}
    for hop in range(hops):
        shifts = {}
        if hop < hops - 1:
            shifts = {
                kind: collectives.ring_shift(tensors, _held(problem, kind, hop), problem.group)
                for kind, tensors in held.items()
            }
        yield hop, _as_columns(held, hop, problem)
        held = {kind: shift.wait() for kind, shift in shifts.items()}


def _held(problem: Problem, kind: str, hop: int) -> list[int]:
    """How many columns each rank holds at this hop."""
    counts = problem.column_counts(kind)
    return [counts[rank - hop] for rank in range(len(counts))]


def _as_columns(held: dict[str, list[Tensor]], hop: int, problem: Problem) -> Columns:
    def own(kind: str) -> Tensor:
        return own_column(problem, kind, 0) if hop == 0 else torch.full_like(problem.positives, -1, dtype=torch.int32)

    def keys(like: Keys, tensors: list[Tensor]) -> Keys:
        return like.like(tensors[1] if len(tensors) > 1 else None)

    passages = held["passage"]
    columns = Columns(
        passages=passages[0], passage_keys=keys(problem.passage_keys, passages), own_passage=own("passage")
    )
    if "query" not in held:
        return columns
    queries = held["query"]
    return replace(columns, queries=queries[0], query_keys=keys(problem.row_keys, queries), own_query=own("query"))


class _PrefixSoftmaxes:
    """The softmaxes of one prefix, each as sum_j exp(s_ij) = total_B * exp(score_B + top_B).

    top_B is 0 but for rows that would overflow.
    """

    def __init__(self, rows: Rows, problem: Problem):
        self._rows, self._problem, self._schedule = rows, problem, schedule(problem.objective)
        self._top_B = [torch.zeros_like(rows.score_B) for _ in self._schedule]
        self._total_B = [torch.zeros_like(rows.score_B) for _ in self._schedule]
        self._weights_B: list[Tensor] = []

    def _walk(self, columns: Columns, keys: MatchedKeys) -> Iterator[tuple[int, Step, Block, int, int]]:
        """(softmax, step, block, start, stop) for every chunk of every block."""
        columns = columns.prefix(self._rows.queries.shape[1])
        for softmax, (steps, _) in enumerate(self._schedule):
            for step in steps:
                block = self._rows.block(step, columns, keys[step.direction])
                for start, stop in chunks(
                    block.rows.shape[0], block.columns.shape[0], block.columns.dtype, self._problem
                ):
                    yield softmax, step, block, start, stop

    def add_sums(self, columns: Columns, keys: MatchedKeys, counts: Tensor | None) -> None:
        for softmax, _, block, start, stop in self._walk(columns, keys):
            score_r, top_r, total_r = (
                each[start:stop] for each in (self._rows.score_B, self._top_B[softmax], self._total_B[softmax])
            )
            _, sum_r, pivot_r = self._problem.kernels.exp_scores(
                block, start, stop, score_r, keep=False, counts=counts if softmax == 0 else None
            )
            shift_r = pivot_r - score_r
            highest_r = torch.maximum(top_r, shift_r)
            total_r.copy_(total_r * torch.exp(top_r - highest_r) + sum_r * torch.exp(shift_r - highest_r))
            top_r.copy_(highest_r)

    def finish(self) -> None:
        """Closes the first sweep: the loss, and the weight of every row for the second."""
        for (_, weight), top_B, total_B in zip(self._schedule, self._top_B, self._total_B, strict=True):
            top_B += self._rows.score_B  # from here on the pivot
            loss_B, weights, coefficient_B = self._problem.kernels.finish(
                [total_B], [top_B], self._rows.score_B, self._rows.factor(weight)
            )
            self._weights_B += weights
            self._rows.add(loss_B, coefficient_B, weight)

    def add_gradients(
        self, columns: Columns, keys: MatchedKeys, wanted: Wanted, *, first_hop: bool
    ) -> dict[str, Tensor]:
        """Adds to the rows' gradients; returns those of the columns by kind."""
        gradients = empty_column_gradients(self._problem, wanted, columns.prefix(self._rows.queries.shape[1]))
        for softmax, step, block, start, stop in self._walk(columns, keys):
            exp_rC, _, _ = self._problem.kernels.exp_scores(block, start, stop, self._top_B[softmax][start:stop])
            self._problem.kernels.add_gradients(
                block,
                exp_rC,
                start,
                stop,
                self._weights_B[softmax][start:stop],
                self._rows.gradients.get(step.row),
                gradients.get(step.column),
                fresh_rows=step.first_row and first_hop,
                fresh_columns=step.first_column and start == 0,
            )
            del exp_rC
        return gradients
