"""negatives="ring": no rank ever holds all columns. They travel from rank to rank while the previous ones are scored.

Shapes: W world size, B local queries (rows), M local passages, D dimension, r rows of a chunk, C columns of one rank.

Two sweeps of W hops. The first needs only the sums of every row's softmax. The second makes the gradients; those of a
rank's columns travel one hop behind the columns, every rank adding its rows' share, and arrive at their owner complete.
Scores are made twice (8 B N D operations instead of 6), and memory holds a few ranks' columns whatever W is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from inbatch import collectives
from inbatch.losses.softmax import Columns, Rows


def solve(rows: Rows, passages: Tensor, query_columns: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Fill `rows`; return the gradients of this rank's passages as columns, and of its queries as columns."""
    local = rows.columns(passages, query_columns)
    kernels, score_B = rows.kernels, rows.score_B
    # Each softmax so far is sum_j exp(s_ij) = total_B * exp(score_B + top_B); top_B is 0 but for rows that overflowed.
    top_B, total_B = torch.zeros_like(score_B), torch.zeros_like(score_B)
    for columns in _hops(rows, local):
        for block in rows.blocks(columns):
            for start, stop in rows.chunks(len(block.columns)):
                score_r = score_B[start:stop]
                _, sum_r, pivot_r = kernels.exp_scores(block.part(start, stop), score_r, keep=False)
                _add_sums(total_B[start:stop], top_B[start:stop], sum_r, pivot_r - score_r)
    if rows.counts is not None:
        rows.count(sum(sum(_counts(rows, direction.split("_to_")[1])) for direction in rows.term.directions))
    pivot_B = top_B.add_(score_B)
    (weight_B,) = rows.finish(0, len(score_B), [total_B], [pivot_B])
    if not any(rows.wanted):
        return None, None

    rows.written.clear()  # by blocks that no gradient was asked of
    rows.counts = None  # once is enough
    shifts: dict[str, collectives.RingShift] = {}
    for hop, columns in enumerate(_hops(rows, local)):
        for kind, of_kind in columns.items():
            rows.add_gradient(kind, of_kind)
        for block in rows.blocks(columns):
            for start, stop in rows.chunks(len(block.columns)):
                chunk = block.part(start, stop)
                exp_rC, _, _ = kernels.exp_scores(chunk, pivot_B[start:stop])
                kernels.add_gradients(chunk, exp_rC, weight_B[start:stop], rows=True, columns=True)
                del exp_rC
        for kind, of_kind in columns.items():
            if of_kind.gradient is not None:
                if hop > 0:
                    of_kind.gradient += shifts[kind].wait()[0]
                shifts[kind] = collectives.ring_shift(
                    [of_kind.gradient], collectives.held(_counts(rows, kind), hop), rows.problem.group
                )
    arrived = {kind: shift.wait()[0] for kind, shift in shifts.items()}
    return arrived.get("passage"), arrived.get("query")


def around(
    tensors: list[Tensor], counts: list[int], rank: int, group: ProcessGroup | None
) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield (rank of the owner, its tensors), beginning with this rank, while the next ones are on their way.

    counts: of the tensors' rows, by rank.
    """
    for hop in range(len(counts)):
        shift = None
        if hop < len(counts) - 1:
            shift = collectives.ring_shift(tensors, collectives.held(counts, hop), group)
        yield (rank - hop) % len(counts), tensors
        if shift is not None:
            tensors = shift.wait()


def _hops(rows: Rows, local: dict[str, Columns]) -> Iterator[dict[str, Columns]]:
    """Yield the columns of each rank by kind, beginning with this one."""
    problem, journeys = rows.problem, {}
    for kind, columns in local.items():
        packed = columns.keys.packed()
        travelling = [columns.embeddings] if packed is None else [columns.embeddings, packed]
        journeys[kind] = around(travelling, _counts(rows, kind), problem.rank, problem.group)
    # No row's positive is among the columns of another rank.
    nowhere = torch.full(rows.score_B.shape, -1, dtype=torch.int32, device=rows.score_B.device)
    for hop in range(len(problem.passage_counts)):
        held = {}
        for kind, journey in journeys.items():
            _, (embeddings, *packed) = next(journey)
            keys = local[kind].keys.like(packed[0] if packed else None)
            positive = nowhere if hop else local[kind].positive
            held[kind] = Columns(embeddings=embeddings, keys=keys, positive=positive)
        yield held


def _counts(rows: Rows, kind: str) -> list[int]:
    return rows.problem.passage_counts if kind == "passage" else rows.problem.query_counts


def _add_sums(total_r: Tensor, top_r: Tensor, sum_r: Tensor, shift_r: Tensor) -> None:
    """Add sum_r * exp(shift_r) to total_r * exp(top_r), in place, without overflow."""
    highest_r = torch.maximum(top_r, shift_r)
    total_r.copy_(total_r * torch.exp(top_r - highest_r) + sum_r * torch.exp(shift_r - highest_r))
    top_r.copy_(highest_r)
