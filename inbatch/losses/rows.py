"""The rows of one prefix: their scores, their loss and their side of the gradient.

Shapes: B local queries (rows), D dimension of the prefix, r rows of one chunk, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inbatch.losses.blocks import Block, accumulator_dtype
from inbatch.losses.problem import Columns, Problem, Step, prefix, schedule


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Whose gradient is wanted."""

    queries: bool
    passages: bool
    temperature: bool

    @property
    def any(self) -> bool:
        return self.queries or self.passages or self.temperature

    def row(self, kind: str) -> bool:
        return self.temperature or (self.queries if kind == "query" else self.passages)

    def column(self, kind: str) -> bool:
        return self.queries if kind == "query" else self.passages


class Rows:
    """Queries and their positives, and what accumulates over the columns they are compared with."""

    def __init__(
        self, queries: Tensor, positives: Tensor, problem: Problem, wanted: Wanted, scale: Tensor, weight: float
    ):
        self.queries, self.positives, self.problem, self.wanted, self.scale = queries, positives, problem, wanted, scale
        self.weight = weight * problem.row_weight
        self.score_B, self.scale_B = problem.kernels.positive_scores(queries, positives, scale)
        self.limit_B = None if problem.margin is None else self.score_B + problem.margin * scale
        self._loss: Tensor | None = None
        self.coefficient_B: Tensor | None = None
        used = {step.row for steps, _ in schedule(problem.objective) for step in steps}
        # Every block overwrites or adds to all rows, so only what no block touches has to start at zero.
        self.gradients = {
            kind: torch.empty_like(rows, dtype=scale.dtype)
            if kind in used
            else torch.zeros_like(rows, dtype=scale.dtype)
            for kind, rows in (("query", queries), ("positive", positives))
            if wanted.row(kind) and (kind in used or kind == "query")
        }

    def block(self, step: Step, columns: Columns, keys: tuple[tuple[Tensor, Tensor], ...]) -> Block:
        return Block(
            rows=self.queries if step.row == "query" else self.positives,
            columns=columns.of(step.column),
            own=columns.own(step.column),
            scale=self.scale_B,
            keys=keys,
            limit=self.limit_B,
        )

    def factor(self, weight: float) -> Tensor:
        """What a softmax of this weight multiplies the gradient of q.p with."""
        return self.scale * (self.weight * weight)

    def add(self, loss_B: Tensor, coefficient_B: Tensor, weight: float) -> None:
        """Adds a softmax: its loss for every row, and the gradient of every positive's score (times the factor)."""
        loss = loss_B.sum() * (self.weight * weight)
        self._loss = loss if self._loss is None else self._loss + loss
        self.coefficient_B = coefficient_B if self.coefficient_B is None else self.coefficient_B + coefficient_B

    @property
    def loss(self) -> Tensor:
        assert self._loss is not None
        return self._loss

    def close(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Adds the positive term. Returns the gradients to the queries and to the positives as rows, [B, D] each, and

        the sum over all scores of (gradient of the score) times score. None: not wanted.
        """
        assert self.coefficient_B is not None
        coefficient_B1 = self.coefficient_B[:, None]
        queries, positives = self.gradients.get("query"), self.gradients.get("positive")
        if queries is not None:
            queries.addcmul_(coefficient_B1, self.positives)
        inner = None
        if self.wanted.temperature and queries is not None:
            # Each score belongs to one row, so the rows' gradients hold all of it, the positive's once.
            inner = (self.queries.to(self.scale.dtype) * queries).sum()
            if positives is not None:
                inner += (self.positives.to(self.scale.dtype) * positives).sum()
        if self.wanted.passages:
            if positives is None:
                positives = coefficient_B1 * self.queries
            else:
                positives.addcmul_(coefficient_B1, self.queries)
        return queries, positives, inner


def make_rows(queries: Tensor, positives: Tensor, problem: Problem, wanted: Wanted, scale: Tensor) -> list[Rows]:
    """One for each prefix, the longest first."""
    return [
        Rows(prefix(queries, dim), prefix(positives, dim), problem, wanted, scale, weight)
        for dim, weight in problem.objective.prefixes(queries.shape[1])
    ]


def empty_column_gradients(problem: Problem, wanted: Wanted, columns: Columns) -> dict[str, Tensor]:
    """Where the gradients of columns go, by kind. Zero if no row will ever write them."""
    make = torch.empty_like if problem.positives.shape[0] else torch.zeros_like
    kinds = {step.column for steps, _ in schedule(problem.objective) for step in steps if columns.has(step.column)}
    dtype = accumulator_dtype(columns.passages.dtype)
    return {kind: make(columns.of(kind), dtype=dtype) for kind in sorted(kinds) if wanted.column(kind)}
