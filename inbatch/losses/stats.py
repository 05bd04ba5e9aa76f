"""Figures of the softmax for the log: counted by the loss, read on demand."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from inbatch import collectives


class LossStats:
    """Collect from every info_nce(..., stats=...) until `reset`; costs no pass over the scores and no synchronisation.

    `result()` is collective (every rank of the group calls it) and returns figures over all rows of all ranks:

        candidates   mean number of columns in a row's softmax, its positive included
        masked       fraction of the columns other than the positive that were left out as false negatives
        accuracy     fraction of rows whose positive scores highest among the candidates (rounding decides ties)
        mrr          mean of 1 / the positive's rank among the candidates

    With several softmaxes (per_direction, Matryoshka) the first direction and the longest prefix are counted.
    """

    def __init__(self) -> None:
        self._totals: Tensor | None = None
        self._group: ProcessGroup | None = None

    def reset(self) -> None:
        """Forget what was collected."""
        self._totals = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LossStats:
        other = type(self)()
        other._totals = copy.deepcopy(self._totals, memo)
        other._group = self._group  # which cannot be copied
        return other

    def add(self, counts_B: Tensor, others: int, group: ProcessGroup | None) -> None:
        """Add counts [B, 2]: masked columns, columns that beat the positive; others: columns besides the positive."""
        rows = counts_B.shape[0]
        masked_B, beaten_B = counts_B.double().unbind(1)
        sums = masked_B.sum(), (beaten_B > 0).double().sum(), (1 / (1 + beaten_B)).sum()
        new = torch.stack([torch.full_like(sums[0], rows), torch.full_like(sums[0], rows * others), *sums])
        self._totals = new if self._totals is None else self._totals + new
        self._group = group

    def result(self) -> dict[str, float]:
        """Return the figures so far, from every rank of the group together; ValueError if any rank has none."""
        nothing = "LossStats has collected nothing yet: pass it to info_nce(..., stats=...) first"
        collectives.agree("LossStats.result", group=self._group, error=nothing if self._totals is None else None)
        assert self._totals is not None
        totals = collectives.all_reduce(self._totals.clone(), "sum", self._group)
        rows, others, masked, beaten, reciprocal_ranks = totals.tolist()
        return {
            "candidates": 1 + (others - masked) / rows,
            "masked": masked / others if others else 0.0,
            "accuracy": 1 - beaten / rows,
            "mrr": reciprocal_ranks / rows,
        }
