"""What info_nce was asked, as the solvers see it: rows, columns, keys, and the schedule of blocks.

Shapes: B local queries (rows), M local passages, D dimension (of a prefix), C columns of any kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import _get_current_dispatch_mode

from inbatch import collectives
from inbatch.losses.blocks import accumulator_dtype
from inbatch.losses.masking import Keys, match
from inbatch.losses.objective import DIRECTIONS, Objective
from inbatch.losses.stats import LossStats

MatchedKeys = dict[str, tuple[tuple[Tensor, Tensor], ...]]
_SMALLEST_NORM = 1e-12


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Checked, and agreed on by the ranks. Lists are by rank."""

    positives: Tensor  # int64 [B]: each row's positive among the local passages
    stride: int | None  # not None: positives are 0, stride, 2 * stride, ...
    query_counts: list[int]
    passage_counts: list[int]
    row_keys: Keys
    passage_keys: Keys
    margin: float | None
    objective: Objective
    negatives: str
    kernels: Any  # the module with the kernel functions; None: the reference
    chunk_mib: float | None
    stats: LossStats | None
    group: ProcessGroup | None

    @property
    def row_weight(self) -> float:
        """Averaged over ranks, a row then counts 1 / (rows of all ranks)."""
        return len(self.query_counts) / sum(self.query_counts)

    def column_counts(self, kind: str) -> list[int]:
        return self.passage_counts if kind == "passage" else self.query_counts

    def positives_of(self, passages: Tensor) -> Tensor:
        """Each row's positive [B, D]."""
        if self.stride is None:
            return passages.index_select(0, self.positives)
        return passages[:: self.stride]

    def add_to_positives(self, passages: Tensor, values: Tensor) -> None:
        """passages[positives] += values, in an order that is the same in every run."""
        if self.stride is not None:
            passages[:: self.stride] += values
        elif passages.is_cuda:
            passages.index_put_((self.positives,), values, accumulate=True)  # sorts; index_add_ would race
        else:
            passages.index_add_(0, self.positives, values)


def kept(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Remembers the tensors that `make` made, because making one costs a kernel launch. They are never written to.

    Not while a mode is on that changes what tensors are, such as FakeTensorMode: its tensors are no use after it.
    """
    remembering = lru_cache(maxsize=64)(make)

    @wraps(make)
    def get(*arguments: Any) -> Tensor:
        return (remembering if _get_current_dispatch_mode() is None else make)(*arguments)

    return get


@kept
def constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A 0-d tensor. Never saved for a backward."""
    return torch.full((), value, dtype=dtype, device=device)


@kept
def every(step: int, start: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """start, start + step, ...: `count` integers."""
    return torch.arange(start, start + step * count, step, dtype=dtype, device=device)


@kept
def _every_within(step: int, count: int, cut: tuple[int, int], before: int, device: torch.device) -> Tensor:
    """The place of 0, step, 2 * step, ... (`count` of them) among those in `cut`, plus `before`; -1 for the others."""
    return _within(torch.arange(0, step * count, step, device=device), cut, before)


def _within(places: Tensor, cut: tuple[int, int], before: int) -> Tensor:
    outside = (places < cut[0]) | (places >= cut[1])
    return (places + (before - cut[0])).masked_fill_(outside, -1).int()


def rows_of(embeddings: Tensor) -> Tensor:
    """The same [rows, D], each row contiguous and apart from the others, as the kernels read them."""
    if embeddings.is_contiguous() or (embeddings.stride(1) == 1 and embeddings.stride(0) >= embeddings.shape[1]):
        return embeddings
    return embeddings.contiguous()


# ---- columns


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What rows are compared with. own: each row's own column (its positive, or itself), -1 where that is elsewhere."""

    passages: Tensor
    passage_keys: Keys
    own_passage: Tensor
    queries: Tensor | None = None
    query_keys: Keys = field(default_factory=Keys)
    own_query: Tensor | None = None

    def has(self, kind: str) -> bool:
        return kind == "passage" or self.queries is not None

    def of(self, kind: str) -> Tensor:
        columns = self.passages if kind == "passage" else self.queries
        assert columns is not None
        return columns

    def own(self, kind: str) -> Tensor:
        own = self.own_passage if kind == "passage" else self.own_query
        assert own is not None
        return own

    def keys(self, kind: str) -> Keys:
        return self.passage_keys if kind == "passage" else self.query_keys

    def prefix(self, dim: int) -> Columns:
        queries = None if self.queries is None else prefix(self.queries, dim)
        return replace(self, passages=prefix(self.passages, dim), queries=queries)


def own_column(problem: Problem, kind: str, before: int, cut: tuple[int, int] | None = None) -> Tensor:
    """Each row's own column, `before` columns of other ranks standing in front of this rank's.

    cut: only these of this rank's passages are columns, and -1 is the own column of a row whose positive is another.
    """
    count, device = problem.positives.shape[0], problem.positives.device
    if kind == "passage" and problem.stride is None:
        return (problem.positives + before).int() if cut is None else _within(problem.positives, cut, before)
    step = 1 if kind == "query" else problem.stride or 1
    if cut is None:
        return every(step, before, count, torch.int32, device)
    return _every_within(step, count, cut, before, device)


def gather_columns(
    queries: Tensor | None, passages: Tensor, problem: Problem, cut: tuple[int, int] | None = None
) -> Columns:
    """All ranks' columns; with negatives="local" this rank's. queries None: passages only. Differentiable.

    cut: `passages` and the problem's keys and counts are of a piece, here passages cut[0] to cut[1] of this rank's.
    """
    local, position = problem.negatives == "local", collectives.rank(problem.group)

    def gather(tensor: Tensor, counts: list[int]) -> Tensor:
        return tensor if local else collectives.all_gather(tensor, problem.group, rows=counts)

    def gather_keys(keys: Keys, counts: list[int]) -> Keys:
        packed = keys.packed()
        return keys if packed is None or local else keys.like(gather(packed, counts))

    before = 0 if local else sum(problem.passage_counts[:position])
    columns = Columns(
        passages=gather(passages, problem.passage_counts),
        passage_keys=gather_keys(problem.passage_keys, problem.passage_counts),
        own_passage=own_column(problem, "passage", before, cut),
    )
    if queries is None or not problem.objective.query_columns:
        return columns
    return replace(
        columns,
        queries=gather(queries, problem.query_counts),
        query_keys=gather_keys(problem.row_keys, problem.query_counts),
        own_query=own_column(problem, "query", 0 if local else sum(problem.query_counts[:position])),
    )


def keys_of_rows(keys: Keys, direction: str) -> Keys:
    """A passage as a row against queries stands for itself, not for the other known positives of its query."""
    if direction == "passage_to_query" and keys.documents is not None:
        return Keys(documents=keys.documents[:, :1], queries=keys.queries)
    return keys


def match_all(problem: Problem, columns: Columns) -> MatchedKeys:
    """Compacted (row, column) keys by direction."""
    available = [each for each in problem.objective.directions if columns.has(DIRECTIONS[each][1])]
    return {
        direction: match(keys_of_rows(problem.row_keys, direction), columns.keys(DIRECTIONS[direction][1]))
        for direction in available
    }


# ---- prefixes


def prefix(full: Tensor, dim: int) -> Tensor:
    """The first `dim` dimensions, renormalised; the full dimension as it is. Differentiable."""
    if dim == full.shape[1]:
        return full
    return F.normalize(full[:, :dim].to(accumulator_dtype(full.dtype)), dim=1, eps=_SMALLEST_NORM).to(full.dtype)


def add_prefix_gradient(total: Tensor | None, gradient: Tensor, full: Tensor) -> Tensor:
    """Adds to `total` [n, D of full] (None: nothing yet) the gradient to `full` of a gradient to its prefix [n, D]."""
    dim = gradient.shape[1]
    if dim < full.shape[1]:
        raw = full[:, :dim].to(gradient.dtype)
        norm = raw.norm(dim=1, keepdim=True).clamp_min_(_SMALLEST_NORM)
        unit = raw / norm
        gradient = (gradient - unit * (unit * gradient).sum(1, keepdim=True)) / norm
    if total is None:
        return F.pad(gradient, (0, full.shape[1] - dim)) if dim < full.shape[1] else gradient
    total[:, :dim] += gradient
    return total


# ---- schedule


@dataclass(frozen=True, kw_only=True)
class Step:
    """One block of one softmax. first_*: nothing was added before to the gradient of these rows, these columns."""

    direction: str
    row: str  # "query" or "positive"
    column: str  # "passage" or "query"
    first_row: bool
    first_column: bool


@lru_cache(maxsize=64)
def schedule(objective: Objective) -> list[tuple[list[Step], float]]:
    """The steps and the weight of every softmax, in the order of work."""
    seen, softmaxes = set(), []
    for directions, weight in objective.softmaxes():
        steps = []
        for direction in directions:
            row, column = DIRECTIONS[direction]
            first_row, first_column = ("row", row) not in seen, ("column", column) not in seen
            steps.append(
                Step(direction=direction, row=row, column=column, first_row=first_row, first_column=first_column)
            )
            seen |= {("row", row), ("column", column)}
        softmaxes.append((steps, weight))
    return softmaxes


def chunks(num_rows: int, num_columns: int, dtype: torch.dtype, problem: Problem) -> list[tuple[int, int]]:
    """Equal ranges of rows whose exponentials fit the chunk size."""
    kernels = problem.kernels
    row_mib = max(num_columns * kernels.exp_itemsize(dtype), 1) / 2**20
    limits = kernels.DEFAULT_CHUNKS if problem.chunk_mib is None else ((problem.chunk_mib, math.inf),)
    fitting = max(1, *(int(min(mib / row_mib, rows)) for mib, rows in limits))
    pieces = -(-num_rows // fitting) if num_rows else 0
    size = -(-num_rows // max(pieces, 1))
    if size < num_rows and fitting >= kernels.ROW_MULTIPLE:
        size = min(
            -(-size // kernels.ROW_MULTIPLE) * kernels.ROW_MULTIPLE,
            fitting // kernels.ROW_MULTIPLE * kernels.ROW_MULTIPLE,
        )
    return [(start, min(start + size, num_rows)) for start in range(0, num_rows, max(size, 1))]
