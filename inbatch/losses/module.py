"""`info_nce` as a module, which holds its options and may learn the temperature."""

from __future__ import annotations

import copy
import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from inbatch import collectives
from inbatch.losses.info_nce import IMPLEMENTATIONS, NEGATIVES, info_nce, one_of
from inbatch.losses.masking import FalseNegatives
from inbatch.losses.objective import Objective
from inbatch.losses.stats import LossStats
from inbatch.other_names import explains_other_names


class _Averaged(torch.autograd.Function):
    """The same value; its gradient is averaged over the ranks. Where DDP does that too, it averages equal numbers."""

    @staticmethod
    def forward(ctx, value: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        rows = [1] * collectives.world_size(ctx.group)
        return collectives.all_gather(gradient[None], ctx.group, rows=rows).mean(0), None


class InfoNCELoss(nn.Module):
    """info_nce with its options held; `forward` takes what changes from batch to batch.

    learnable: the temperature is a parameter, kept positive as exp(log_temperature). Its gradient is averaged over the
    ranks in the backward, inside DDP or outside of it: every rank runs the backward, or none.
    """

    @explains_other_names
    def __init__(
        self,
        temperature: float = 0.02,
        *,
        learnable: bool = False,
        negatives: str = "gather",
        impl: str = "auto",
        group: ProcessGroup | None = None,
        objective: Objective | None = None,
        chunk_mib: float | None = None,
        token_reduction: str = "sum",
    ):
        super().__init__()
        if not (isinstance(temperature, Real) and 0 < float(temperature) < math.inf):
            raise ValueError(f"temperature must be a positive number to start from, got {temperature!r}")
        if negatives not in NEGATIVES:
            raise ValueError(f"negatives must be {one_of(NEGATIVES)}, got {negatives!r}")
        if impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl must be {one_of(IMPLEMENTATIONS)}, got {impl!r}")
        self._fixed_temperature, self.token_reduction = float(temperature), token_reduction
        self.log_temperature = nn.Parameter(torch.tensor(math.log(float(temperature)))) if learnable else None
        self.negatives, self.impl, self.group = negatives, impl, group
        self.objective, self.chunk_mib = objective, chunk_mib

    @property
    def temperature(self) -> float | Tensor:
        """Return the temperature in use: a float, or a 0-d tensor that requires grad if it is learnable."""
        return self._fixed_temperature if self.log_temperature is None else self.log_temperature.exp()

    @collectives.uncompiled
    def forward(
        self,
        queries: Tensor,
        passages: Tensor,
        *,
        positives: Tensor | None = None,
        false_negatives: FalseNegatives | None = None,
        stats: LossStats | None = None,
        weights: Tensor | None = None,
        query_mask: Tensor | None = None,
        passage_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of queries [B, D] and passages [M, D], 0-d: `info_nce` with what the module holds."""
        temperature = self.temperature
        if isinstance(temperature, Tensor) and collectives.world_size(self.group) > 1:
            temperature = _Averaged.apply(temperature, self.group)
        return info_nce(
            queries,
            passages,
            positives=positives,
            temperature=temperature,  # type: ignore[arg-type]
            false_negatives=false_negatives,
            negatives=self.negatives,
            impl=self.impl,
            group=self.group,
            objective=self.objective,
            chunk_mib=self.chunk_mib,
            stats=stats,
            weights=weights,
            query_mask=query_mask,
            passage_mask=passage_mask,
            token_reduction=self.token_reduction,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> InfoNCELoss:
        # A process group cannot be copied, and a copy (a moving average of the weights, say) is for the same processes.
        memo[id(self.group)] = self.group
        memo[id(self)] = other = type(self).__new__(type(self))
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    def extra_repr(self) -> str:
        fixed, learnt = self._fixed_temperature, self.log_temperature
        if learnt is None:
            temperature = f"{fixed:g}"
        else:  # which has no value while it is on the meta device
            temperature = "learnable" if learnt.is_meta else f"{math.exp(learnt.item()):g}, learnable"
        return f"temperature={temperature}, negatives={self.negatives!r}, impl={self.impl!r}"
