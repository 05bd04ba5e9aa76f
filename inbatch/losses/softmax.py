"""The state of one softmax for every row: the request, the rows, and the columns.

Shapes: B local queries (rows), M local passages, D dimension, C columns of one kind, r rows of a chunk.

Both solvers (`gathered`: columns at hand; `ring`: columns that travel) make blocks of `Rows` and `Columns` here, walk
them in chunks of rows, and finish each row here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import _get_current_dispatch_mode

from inbatch.losses.kernels import Block, Groups, Kernels
from inbatch.losses.masking import NO_IDS, NO_KEYS, FalseNegatives, Keys, match
from inbatch.losses.objective import DIRECTIONS, PLAIN, Objective, Term
from inbatch.losses.stats import LossStats

LEAST_TEMPERATURE = 1e-30  # whose inverse is a float32
TOKEN_REDUCTIONS = ("sum", "mean")


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Hold the arguments of info_nce and, below, the facts that the ranks agreed on. Lists are by rank."""

    temperature: float | Tensor
    group: ProcessGroup | None
    objective: Objective = PLAIN
    false_negatives: FalseNegatives = NO_IDS
    negatives: str = "gather"
    chunk_mib: float | None = None
    stats: LossStats | None = None
    positives: slice | Tensor  # each row's positive among the passages at hand: every n-th, or int64 [B]
    kernels: Kernels | None = None  # None: the reference
    dtype: torch.dtype = torch.float32  # of the embeddings given
    token_reduction: str = "sum"  # of late interaction
    rank: int = 0
    query_counts: list[int] = field(default_factory=list)
    passage_counts: list[int] = field(default_factory=list)
    weights: Tensor | None = None  # of the rows, in float32 (float64 for float64)
    rules: Tensor | None = None  # of the rows' groups; None: nothing depends on groups
    row_keys: Keys = NO_KEYS
    passage_keys: Keys = NO_KEYS
    query_keys: Keys = NO_KEYS  # of the queries at hand as columns
    first_query: int = 0  # the place of row 0 among the queries at hand

    @property
    def unmasked(self) -> bool:
        """True if every column counts, equally for every row, and there are no statistics."""
        keys = (self.row_keys, self.passage_keys, self.query_keys)
        if any(key.documents is not None or key.queries is not None for key in keys):
            return False
        others = self.weights, self.stats, self.rules, self.false_negatives.margin
        return all(other is None for other in others)

    @property
    def row_weight(self) -> float:
        """W / (rows of all ranks): the weight of a row, so that the mean over ranks is the loss."""
        return len(self.query_counts) / sum(self.query_counts)


@dataclass(kw_only=True, slots=True)
class Columns:
    """Hold columns of one kind, in one piece."""

    embeddings: Tensor  # [C, D]
    keys: Keys
    positive: Tensor  # int32 [B]: each row's positive (or, among queries, the row itself), -1 if not among these
    gradient: Tensor | None = None  # [C, D] in the accumulator's dtype; None: not wanted
    written: bool = False  # False: `gradient` holds garbage


class Rows:
    """Queries and their positives as rows of one softmax: scores, losses and gradients, filled chunk by chunk.

    wanted: whose gradient is wanted, of (queries, passages, queries as columns, temperature).
    """

    def __init__(self, queries: Tensor, passages: Tensor, problem: Problem, term: Term, wanted: tuple[bool, ...]):
        assert problem.kernels is not None
        self.problem, self.term, self.kernels, self.wanted = problem, term, problem.kernels, wanted
        temperature, margin = problem.temperature, problem.false_negatives.margin
        positives = passages[problem.positives]
        dtype = torch.promote_types(queries.dtype, torch.float32)
        if isinstance(temperature, Tensor):
            self.scale = temperature.detach().to(queries.device, dtype).reciprocal()
        else:
            self.scale = 1 / temperature
        self.score_B, self.scale_B = self.kernels.positive_scores(queries, positives, self.scale)
        self.limit_B = None if margin is None else self.score_B + margin * self.scale
        self.weight = term.weight * problem.row_weight
        self.loss_B, self.coefficient_B = torch.empty((2, len(queries)), dtype=dtype, device=queries.device).unbind()
        self.counts = None
        if problem.stats is not None:
            self.counts = torch.zeros((queries.shape[0], 2), dtype=torch.int32, device=queries.device)
        self.sides = {"query": queries, "positive": positives}
        used = {DIRECTIONS[direction][0] for direction in term.directions}
        self.gradients = {
            side: (torch.empty_like if side in used else torch.zeros_like)(rows, dtype=dtype)
            for side, rows, needed in (("query", queries, wanted[0]), ("positive", positives, wanted[1]))
            if (needed or wanted[3]) and (side in used or side == "query")
        }
        self.written: set[str] = set()  # the sides whose gradient holds more than garbage

    def columns(self, passages: Tensor, query_columns: Tensor | None) -> dict[str, Columns]:
        """Return the columns at hand by kind: the passages, if the softmax compares with any, and the queries."""
        problem, columns = self.problem, {}
        if any(direction.endswith("passage") for direction in self.term.directions):
            positive = places(problem.positives, 0, passages.device)
            columns["passage"] = Columns(embeddings=passages, keys=problem.passage_keys, positive=positive)
        if query_columns is not None:
            positive = places(slice(0, len(self.score_B), 1), problem.first_query, passages.device)
            columns["query"] = Columns(embeddings=query_columns, keys=problem.query_keys, positive=positive)
        return columns

    def add_gradient(self, kind: str, columns: Columns) -> None:
        """Make room for the columns' gradient, if it is wanted: garbage, or zeros if no row will ever write it."""
        if self.wanted[1 if kind == "passage" else 2]:
            make: Any = torch.empty_like if len(self.score_B) else torch.zeros_like
            columns.gradient = make(columns.embeddings, dtype=self.loss_B.dtype)

    def blocks(self, columns: dict[str, Columns]) -> list[Block]:
        """Return the blocks of this softmax with these columns, by kind, in the order of work."""
        blocks = []
        for direction in self.term.directions:
            side, kind = DIRECTIONS[direction]
            of_kind = columns.get(kind)
            if of_kind is None:
                continue
            block = Block(
                rows=self.sides[side],
                columns=of_kind.embeddings,
                positive=of_kind.positive,
                scale=self.scale_B,
                keys=match(self.problem.row_keys, of_kind.keys, only_itself=direction == "passage_to_query"),
                limit=self.limit_B,
                groups=None if self.problem.rules is None else self._groups(direction, of_kind.keys),
                counts=self.counts,
                d_rows=self.gradients.get(side),
                d_columns=of_kind.gradient,
                adds_to_rows=side in self.written,
                adds_to_columns=of_kind.written,
            )
            blocks.append(block)
            self.written.add(side)
            of_kind.written = True
        return blocks

    def _groups(self, direction: str, columns: Keys) -> Groups:
        rows, rules = self.problem.row_keys.groups, self.problem.rules
        assert rows is not None
        assert rules is not None
        assert columns.groups is not None
        strengths = self.problem.objective.hardness if direction == "query_to_passage" else (0.0, 0.0)
        own_B, others_B = (torch.ones_like(self.scale_B) + strength / self.scale for strength in strengths)
        return Groups(rows=rows, columns=columns.groups, rules=rules, own=own_B, others=others_B)

    def chunks(self, num_columns: int) -> list[tuple[int, int]]:
        """Return equal ranges of rows whose exponentials against so many columns fit the chunk size."""
        kernels, num_rows, chunk_mib = self.kernels, self.loss_B.shape[0], self.problem.chunk_mib
        row_mib = max(num_columns * kernels.exp_itemsize(self.sides["query"].dtype), 1) / 2**20
        limits = kernels.DEFAULT_CHUNKS if chunk_mib is None else ((chunk_mib, math.inf),)
        fitting = max(1, *(int(min(mib / row_mib, rows)) for mib, rows in limits))
        if num_rows <= fitting:
            return [(0, num_rows)] if num_rows else []
        size, multiple = -(-num_rows // -(-num_rows // fitting)), kernels.ROW_MULTIPLE
        if fitting >= multiple:
            size = min(-(-size // multiple), fitting // multiple) * multiple
        return [(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]

    def finish(self, start: int, stop: int, sums: list[Tensor], pivots: list[Tensor]) -> list[Tensor]:
        """Finish rows start..stop of the loss, and return the weights of their exponentials, by block."""
        score_r, loss_r, coefficient_r = (v[start:stop] for v in (self.score_B, self.loss_B, self.coefficient_B))
        block_weights = self.kernels.finish(sums, pivots, score_r, self.scale, self.weight, loss_r, coefficient_r)
        if self.problem.weights is not None:
            for vector_r in (loss_r, coefficient_r, *block_weights):
                vector_r.mul_(self.problem.weights[start:stop])
        return block_weights

    def count(self, num_columns: int) -> None:
        """Add the counts to the stats. num_columns: of this softmax, positives and the rows themselves included."""
        assert self.problem.stats is not None
        assert self.counts is not None
        self.problem.stats.add(self.counts, num_columns - len(self.term.directions), self.problem.group)

    def d_temperature(self) -> Tensor:
        """Return the loss's derivative by the temperature: -scale * (sum over scores of d score * score / scale)."""
        # Each score belongs to one row, so the rows' gradients hold all of them but the positive's.
        total = (self.coefficient_B * (self.score_B / self.scale_B)).sum()
        for side, gradient in self.gradients.items():
            total = total + (self.sides[side].to(gradient.dtype) * gradient).sum()
        return -total * self.scale


def row_major(embeddings: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the embeddings [rows, D] in `dtype`, with contiguous rows that do not overlap, as the kernels need."""
    if embeddings.dtype != dtype:
        embeddings = embeddings.to(dtype)
    if embeddings.is_contiguous() or (embeddings.stride(1) == 1 and embeddings.stride(0) >= embeddings.shape[1]):
        return embeddings
    return embeddings.contiguous()


def refuse_second_derivatives() -> None:
    """Raise RuntimeError in a backward pass that asks for a graph: gradients made beforehand are constants to it."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "info_nce is differentiable once, and this backward pass has create_graph=True; "
            'impl="reference" has second derivatives'
        )


def places(positives: slice | Tensor, before: int, device: torch.device, cut: tuple[int, int] | None = None) -> Tensor:
    """Return int32 [B]: the place of each of `positives` among columns that have `before` others in front.

    cut: only passages cut[0] to cut[1] are columns, and the place of a positive among the others is -1.
    """
    if isinstance(positives, Tensor):
        return _shifted(positives, before, cut)
    # Cached, since making it costs launches; never written to. Not under a dispatch mode such as FakeTensorMode, whose
    # tensors must not outlive it.
    make = _regular_places if _get_current_dispatch_mode() is None else _regular_places.__wrapped__
    return make(positives.start, positives.stop, positives.step, before, device, cut)


@lru_cache(maxsize=64)
def _regular_places(
    start: int, stop: int, step: int, before: int, device: torch.device, cut: tuple[int, int] | None
) -> Tensor:
    return _shifted(torch.arange(start, stop, step, device=device), before, cut)


def _shifted(columns_B: Tensor, before: int, cut: tuple[int, int] | None) -> Tensor:
    if cut is None:
        return (columns_B + before).int()
    outside = (columns_B < cut[0]) | (columns_B >= cut[1])
    return (columns_B + (before - cut[0])).masked_fill_(outside, -1).int()
