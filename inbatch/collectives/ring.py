"""Shift rows around the ring of ranks while computation goes on.

`group`, ranks and `rows` are as in `inbatch.collectives`, which passes these names on.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from inbatch.collectives.process_group import ProcessGroup, global_rank


class RingShift:
    """Hold a shift under way: `wait()` returns the tensors that came from the previous rank."""

    def __init__(self, received: list[Tensor], works: list, sent: list[Tensor]):
        self._received, self._works, self._sent = received, works, sent

    def wait(self) -> list[Tensor]:
        for work in self._works:
            work.wait()
        self._works, self._sent = [], []  # what was sent had to live until here
        return self._received


def held(rows: Sequence[int], hop: int) -> list[int]:
    """Return how many rows each rank holds after `hop` shifts, where rank r began with rows[r]."""
    first = len(rows) - hop
    return [*rows[first:], *rows[:first]]


def ring_shift(tensors: Sequence[Tensor], rows: Sequence[int], group: ProcessGroup | None = None) -> RingShift:
    """Start sending each tensor to the next rank and receiving its counterpart from the previous rank.

    tensors: each [rows[rank], ...], any dtypes. rows: how many rows each rank holds NOW, before the shift: what arrives
    has rows[rank - 1]. Runs beside computation until `.wait()`; the tensors must not be written to before that.
    """
    if len(rows) == 1:
        return RingShift(list(tensors), [], [])
    size, me = len(rows), dist.get_rank(group)
    assert all(t.shape[0] == rows[me] for t in tensors), f"expected {rows[me]} rows, got {[t.shape for t in tensors]}"
    sent = [t.contiguous() for t in tensors]
    received = [t.new_empty(rows[me - 1], *t.shape[1:]) for t in tensors]
    to, source = (global_rank(other % size, group) for other in (me + 1, me - 1))
    ops = []
    for tag, (out, into) in enumerate(zip(sent, received, strict=True)):
        # Bytes travel, so that every dtype works on every backend.
        if out.numel():
            ops.append(dist.P2POp(dist.isend, out.view(-1).view(torch.uint8), to, group, tag))
        if into.numel():
            ops.append(dist.P2POp(dist.irecv, into.view(-1).view(torch.uint8), source, group, tag))
    return RingShift(received, dist.batch_isend_irecv(ops) if ops else [], sent)
