"""Gathering columns, and adding up their gradients over the ranks, in pieces beside the computation.

Every rank's passages are cut into a few pieces. Scores against one piece are computed while the next is being gathered,
and one piece's gradients are added up over the ranks while the next one's are computed. On a GPU the collectives run on
a stream of their own; elsewhere they simply run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from inbatch import collectives
from inbatch.losses.masking import Keys
from inbatch.losses.problem import Columns, MatchedKeys, Problem, gather_columns, match_all

T = TypeVar("T")
MAX_PIECES = 4
SMALLEST_PIECE_BYTES = 2**25  # from the other ranks; below it a collective costs about as much as it could hide


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Columns with their compacted keys; `ready` must be called before they are computed with."""

    columns: Columns
    keys: MatchedKeys
    ready: Callable[[], None]


@lru_cache(maxsize=16)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def beside(device: torch.device, function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
    """Calls function on the side stream, behind all work queued so far. Returns its value, and what makes us wait.

    What it reads must be kept until that wait, and what it returns until its last use is queued: memory of the side
    stream is given out again only to a later call, which waits for this stream first.
    """
    if device.type != "cuda":
        return function(), _nothing
    side, current = _side_stream(device), torch.cuda.current_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        value = function()
    event = side.record_event()
    return value, lambda: torch.cuda.current_stream(device).wait_event(event)


def _nothing() -> None:
    pass


def gather_pieces(queries: Tensor, passages: Tensor, problem: Problem) -> list[Piece]:
    """All columns; queries as columns come with the first piece."""
    pieces = _count(passages, problem)
    if pieces == 1:
        columns = gather_columns(queries, passages, problem)
        return [Piece(columns=columns, keys=match_all(problem, columns), ready=_nothing)]
    position, found = collectives.rank(problem.group), []
    for number in range(pieces):
        cuts = [(m * number // pieces, m * (number + 1) // pieces) for m in problem.passage_counts]

        def gather(cuts: list[tuple[int, int]] = cuts, also: Tensor | None = None if number else queries):
            start, stop = cuts[position]
            keys, counts = _part(problem.passage_keys, start, stop), [b - a for a, b in cuts]
            part = replace(problem, passage_counts=counts, passage_keys=keys)
            columns = gather_columns(also, passages[start:stop], part, cuts[position])
            return columns, match_all(problem, columns)

        (columns, keys), ready = beside(passages.device, gather)
        found.append(Piece(columns=columns, keys=keys, ready=ready))
    return found


def _count(passages: Tensor, problem: Problem) -> int:
    """The same on every rank."""
    ranks = len(problem.passage_counts)
    if problem.negatives == "local" or ranks == 1 or problem.objective.matryoshka_dims:
        return 1
    received = sum(problem.passage_counts) * passages.shape[1] * passages.itemsize * (ranks - 1) // ranks
    return max(1, min(MAX_PIECES, received // SMALLEST_PIECE_BYTES))


def _part(keys: Keys, start: int, stop: int) -> Keys:
    documents, queries = (None if each is None else each[start:stop] for each in (keys.documents, keys.queries))
    return Keys(documents=documents, queries=queries)


class Scatter:
    """Adds up gradients of gathered columns over the ranks: `add` starts a piece, `result` is this rank's rows."""

    def __init__(self, problem: Problem, pieces: int):
        self._problem, self._pieces = problem, pieces
        self._started: dict[str, list[Tensor]] = {}
        self._kept: list[Tensor] = []
        self._waits: list[Callable[[], None]] = []

    def add(self, kind: str, number: int, gradient: Tensor) -> None:
        """gradient [C, D] of all ranks' columns of piece `number`, complete but for the other ranks' shares."""
        problem = self._problem
        if problem.negatives == "local" or len(problem.query_counts) == 1:
            self._started[kind] = [gradient]
            return
        counts = problem.column_counts(kind)
        if kind == "passage":
            counts = [m * (number + 1) // self._pieces - m * number // self._pieces for m in counts]

        def reduce_scatter() -> Tensor:
            return collectives.reduce_scatter_rows(gradient, counts, problem.group)

        rows, wait = (reduce_scatter(), _nothing) if self._pieces == 1 else beside(gradient.device, reduce_scatter)
        self._started.setdefault(kind, []).append(rows)
        self._waits.append(wait)
        self._kept.append(gradient)

    def result(self, kind: str) -> Tensor | None:
        """Pieces in order, [local rows, D]; None if nothing was added."""
        while self._waits:
            self._waits.pop()()
        self._kept.clear()
        parts = self._started.pop(kind, [])
        return (parts[0] if len(parts) == 1 else torch.cat(parts)) if parts else None
