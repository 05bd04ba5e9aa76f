"""One softmax against all columns at once: the autograd function, and the overlap of gathering and computation.

Shapes: B local queries (rows), M passages (this rank's, or all that are columns), Q queries as columns, D dimension,
r rows of a chunk, C columns of a piece.

The gradient is made during the forward pass: exp(score - positive's score) is written once for a chunk of rows; its
sums make the loss, and two products of the same chunk the gradients (README.md derives it). Nothing of size B x N is
kept, and the backward pass neither scores nor communicates: it adds the positive's term, scales and narrows.

Passages of other ranks come in a few pieces: scores against one piece are computed while the next is being gathered,
and one piece's gradients are added up over the ranks while the next one's are computed. On a GPU the collectives run
on a second stream; elsewhere there is no overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from inbatch import collectives
from inbatch.losses import ring
from inbatch.losses.masking import Keys
from inbatch.losses.objective import Term
from inbatch.losses.softmax import Columns, Problem, Rows, places, refuse_second_derivatives, row_major
from inbatch.losses.tiled import add_rows

T = TypeVar("T")
Wait = Callable[[], object]
MAX_PIECES = 4
SMALLEST_PIECE_BYTES = 2**25  # from the other ranks; below it a collective costs about as much as it could hide


class Softmax(torch.autograd.Function):
    """(queries [B, D], passages [M, D], queries as columns [Q, D] or None, temperature, problem, term) -> loss, 0-d.

    loss = term.weight * problem.row_weight * sum_i (log sum_j exp s_ij - s_i,y(i)), columns j of the term's directions.
    Passages are gathered here if problem.negatives is "gather", and travel if it is "ring"; else no others count.
    Differentiable once, by the first four. Embeddings are multiplied in problem.dtype; their gradients have the
    embeddings' dtype, which may be wider.
    """

    @staticmethod
    def forward(
        ctx, queries: Tensor, passages: Tensor, query_columns: Tensor | None, temperature, problem: Problem, term: Term
    ) -> Tensor:
        wanted, device = ctx.needs_input_grad[:4], queries.device
        autocast = (
            torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()
        )
        # Kernels run on the current device, not on that of their arguments.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), autocast:
            ctx.dtype = queries.dtype
            if query_columns is not None:
                query_columns = row_major(query_columns, problem.dtype)
            queries, passages = row_major(queries, problem.dtype), row_major(passages, problem.dtype)
            rows = Rows(queries, passages, problem, term, wanted)
            travels = problem.negatives == "ring" and len(problem.passage_counts) > 1
            d_passages, d_columns = (ring.solve if travels else solve)(rows, passages, query_columns)
            d_temperature = rows.d_temperature() if wanted[3] else None
            d_positives = rows.gradients.get("positive")
            if wanted[1] and d_passages is None:  # passages are positives but no columns
                d_passages = torch.zeros_like(passages, dtype=rows.loss_B.dtype)
            if d_passages is not None and d_positives is not None:
                add_rows(d_passages, problem.positives, d_positives)
            loss = rows.loss_B.sum()
        d_queries = rows.gradients.get("query") if wanted[0] else None
        ctx.save_for_backward(queries, passages, rows.coefficient_B, d_queries, d_passages, d_columns, d_temperature)
        ctx.kernels, ctx.positives, ctx.temperature = rows.kernels, problem.positives, temperature
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):
        refuse_second_derivatives()
        # Once: checkpointing unpacks a tensor a single time.
        queries, passages, coefficient_B, d_queries, d_passages, d_columns, d_temperature = ctx.saved_tensors
        d_queries, d_passages = ctx.kernels.close(
            queries, passages, ctx.positives, coefficient_B, d_queries, d_passages, grad, ctx.dtype
        )
        if d_columns is not None:
            d_columns = (d_columns * grad).to(ctx.dtype)
        if d_temperature is not None:
            d_temperature = (d_temperature * grad).to(ctx.temperature.device, ctx.temperature.dtype)
        return d_queries, d_passages, d_columns, d_temperature, None, None


def solve(rows: Rows, passages: Tensor, query_columns: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Fill `rows`; return the gradients of this rank's passages as columns, and of the query columns."""
    kernels, total, wanted = rows.kernels, rows.loss_B.shape[0], any(rows.wanted)
    pieces = gather_pieces(rows, passages, query_columns)
    work = [(piece, block) for piece in pieces for block in rows.blocks(piece.columns)]
    together = len(pieces) == 1  # nothing to leave early: one call, which makes fewer launches
    num_columns = sum(block.columns.shape[0] for _, block in work)
    chunks = rows.chunks(num_columns)
    for start, stop in chunks:
        chunk = work if len(chunks) == 1 else [(piece, block.part(start, stop)) for piece, block in work]
        score_r = rows.score_B[start:stop]
        exps, sums, pivots = [], [], []
        for piece, block in chunk:
            piece.wait()
            exp_rC, sum_r, pivot_r = kernels.exp_scores(block, score_r, keep=wanted)
            exps.append(exp_rC)
            sums.append(sum_r)
            pivots.append(pivot_r)
        weights = rows.finish(start, stop, sums, pivots)
        if not wanted:
            continue
        # Gradients of the columns first, so that each piece leaves for its owners as soon as it is complete.
        for (piece, block), exp_rC, weight_r in zip(chunk, exps, weights, strict=True):
            kernels.add_gradients(block, exp_rC, weight_r, rows=together, columns=True)
            if stop == total and not together:
                piece.scatter()
        if not together:
            for (_, block), exp_rC, weight_r in zip(chunk, exps, weights, strict=True):
                kernels.add_gradients(block, exp_rC, weight_r, rows=True, columns=False)
        del exps, exp_rC
    if rows.counts is not None:
        rows.count(num_columns)
    if not wanted:
        return None, None
    d_passages = [piece.result() for piece in pieces]
    joined = d_passages[0] if len(pieces) == 1 or d_passages[0] is None else torch.cat(d_passages)  # type: ignore[arg-type]
    return joined, getattr(pieces[0].columns.get("query"), "gradient", None)


# ---- pieces


class Piece:
    """Columns by kind, which may still be arriving; the gradient of the passages goes back to their ranks."""

    def __init__(self, columns: dict[str, Columns], counts: list[int] | None, wait: Wait | None, problem: Problem):
        self.columns, self.wait = columns, wait or _nothing
        self._counts, self._problem = counts, problem  # counts by rank; None: all are this rank's
        self._beside = wait is not None
        self._sent: tuple[Tensor, Wait] | None = None

    def scatter(self) -> None:
        """Start adding up the gradient over the ranks; this rank's share is complete."""
        gradient, counts, group = self.columns["passage"].gradient, self._counts, self._problem.group
        if gradient is None or counts is None or self._sent is not None:
            return

        def reduce_scatter() -> Tensor:
            return collectives.reduce_scatter_rows(gradient, counts, group)

        self._sent = beside(gradient.device, reduce_scatter) if self._beside else (reduce_scatter(), _nothing)

    def result(self) -> Tensor | None:
        """Return the gradient of this rank's passages in the piece."""
        gradient = self.columns["passage"].gradient if "passage" in self.columns else None
        if gradient is None or self._counts is None:
            return gradient
        self.scatter()  # not yet done if there were no rows
        assert self._sent is not None
        rows, wait = self._sent
        wait()
        return rows


def gather_pieces(rows: Rows, passages: Tensor, query_columns: Tensor | None) -> list[Piece]:
    """Return all columns of the softmax: those given, or the passages of all ranks, which may still be arriving."""
    problem = rows.problem
    if problem.negatives != "gather" or len(problem.passage_counts) == 1:
        columns = rows.columns(passages, query_columns)
        for kind, of_kind in columns.items():
            rows.add_gradient(kind, of_kind)
        return [Piece(columns, None, None, problem)]
    position, pieces = problem.rank, []
    number = _how_many(passages, problem)
    for k in range(number):
        cuts = [(m * k // number, m * (k + 1) // number) for m in problem.passage_counts]
        counts, cut = [stop - start for start, stop in cuts], cuts[position]

        def gather(counts: list[int] = counts, cut: tuple[int, int] = cut) -> tuple[Tensor, Keys]:
            keys = gathered_keys(problem.passage_keys.part(*cut), counts, problem.group)
            return collectives.gather_rows(passages[cut[0] : cut[1]], counts, problem.group), keys

        (embeddings, keys), wait = beside(passages.device, gather) if number > 1 else (gather(), None)
        positive = places(problem.positives, sum(counts[:position]), passages.device, cut)
        columns = Columns(embeddings=embeddings, keys=keys, positive=positive)
        rows.add_gradient("passage", columns)
        pieces.append(Piece({"passage": columns}, counts, wait, problem))
    return pieces


def gathered_keys(keys: Keys, counts: list[int], group: ProcessGroup | None) -> Keys:
    """Return the keys of all ranks, of which there are `counts` by rank."""
    packed = keys.packed()
    return keys if packed is None else keys.like(collectives.gather_rows(packed, counts, group))


def _how_many(passages: Tensor, problem: Problem) -> int:
    """Return the number of pieces, the same on every rank."""
    ranks = len(problem.passage_counts)
    received = sum(problem.passage_counts) * passages.shape[1] * passages.itemsize * (ranks - 1) // ranks
    return max(1, min(MAX_PIECES, received // SMALLEST_PIECE_BYTES))


@lru_cache(maxsize=16)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def beside(device: torch.device, function: Callable[[], T]) -> tuple[T, Wait]:
    """Call function on the side stream, behind all work queued so far; return its value and a function that waits.

    Keep the inputs until that wait, and the value until its last use is queued: memory of the side stream is reused
    only by a later call, which waits for the current stream first.
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
