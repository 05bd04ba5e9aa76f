"""The loss: check what is given, agree with the other ranks, choose an implementation, call it.

Shapes: B local queries, M local passages, D dimension.
"""

from __future__ import annotations

import copy
import importlib
import math
from numbers import Real
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from inbatch import collectives
from inbatch.losses import checks, tiled
from inbatch.losses.driver import InfoNCE
from inbatch.losses.masking import FalseNegatives
from inbatch.losses.objective import Objective
from inbatch.losses.reference import reference_loss
from inbatch.losses.stats import LossStats

IMPLEMENTATIONS = ("auto", "reference", "tiled", "fused")


def info_nce(
    queries: Tensor,
    passages: Tensor,
    *,
    positives: Tensor | None = None,
    temperature: float | Tensor = 0.02,
    false_negatives: FalseNegatives | None = None,
    negatives: str = "gather",
    impl: str = "auto",
    group: ProcessGroup | None = None,
    objective: Objective | None = None,
    chunk_mib: float | None = None,
    stats: LossStats | None = None,
) -> Tensor:
    """Mean over the queries of all ranks of  logsumexp_{j in C(i)} s_ij - s_i,y(i),  s_ij = q_i . p_j / temperature.

    C(i): the passages of all ranks less the false negatives of i. `Objective`: other sums of such terms.

    queries [B, D], passages [M, D]: both float16, bfloat16, float32 or float64; B, M may differ by rank and may be 0
    positives [B] int64: column of each query's positive among the local passages; default: equal groups, positive first
        (on a GPU it is checked there; on the CPU it costs no synchronisation)
    temperature: positive float, or a 0-d tensor that may require grad
    negatives: "gather", "ring" (never gathers: memory independent of the number of ranks) or "local" (this rank's only)
    impl: "auto", "reference" (dense), "tiled" (plain PyTorch, bounded memory) or "fused" (Triton)
    chunk_mib: bound on the exponentials held at once by "tiled" (default 32) and "fused" (default 1024, or 4096 rows up
        to 2048, but 2048 rows at least)
    stats: counts what the softmax saw

    Returns a 0-d tensor, float32 (float64 for float64 inputs): W * (this rank's sum) / (queries of all ranks). Averaged
    over the W ranks it is the loss, and gradients averaged over ranks (DDP, FSDP2) are those of one process. They are
    made with the loss, so it is differentiable once (twice with impl="reference").
    Raises ValueError, on every rank, for wrong or disagreeing inputs. (van den Oord et al. 2018; Karpukhin et al. 2020)
    """
    if not torch.is_grad_enabled():  # else the gradient would be made for nothing
        queries, passages, temperature = map(_detached, (queries, passages, temperature))
    if isinstance(temperature, Real):
        temperature = float(temperature)  # NumPy's, too
    extras = (positives, objective, chunk_mib, stats)
    if impl == "auto" and isinstance(queries, Tensor) and queries.is_cuda and all(extra is None for extra in extras):
        small = importlib.import_module("inbatch.losses.triton.small")
        alone = negatives in checks.NEGATIVES and collectives.world_size(group) == 1
        if alone and small.usable(queries, passages, temperature, false_negatives):
            ids = None if false_negatives is None else false_negatives.passage_ids
            return small.SmallInfoNCE.apply(queries, passages, ids, temperature)
    settings = checks.Settings(
        positives=positives,
        temperature=temperature,
        false_negatives=FalseNegatives() if false_negatives is None else false_negatives,
        negatives=negatives,
        group=group,
        objective=Objective() if objective is None else objective,
        chunk_mib=chunk_mib,
        stats=stats,
    )
    error = checks.find_error(queries, passages, settings)
    kernels = None
    if error is None:
        kernels, error = _choose(impl, queries)
    problem = checks.agree(queries, passages, settings, kernels, error)
    if kernels is None:
        return reference_loss(queries, passages, temperature, problem)
    return InfoNCE.apply(queries, passages, temperature, problem)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _choose(impl: str, queries: Tensor) -> tuple[ModuleType | None, str | None]:
    """The module with the kernel functions (None: the reference), or what is wrong."""
    if impl == "reference":
        return None, None
    if impl not in IMPLEMENTATIONS:
        return None, f"impl must be {checks.one_of(IMPLEMENTATIONS)}, got {impl!r}"
    if impl == "tiled" or (impl == "auto" and not queries.is_cuda):
        return tiled, None
    fused = importlib.import_module("inbatch.losses.triton.host")
    reason = fused.why_not(queries)
    if reason is None:
        return fused, None
    return (tiled, None) if impl == "auto" else (None, f'impl="fused" cannot run here: {reason}; use impl="auto"')


class InfoNCELoss(nn.Module):
    """info_nce with its options held; `forward` takes what changes from batch to batch.

    learnable: the temperature is a parameter, kept positive as exp(log_temperature). Its gradient follows the same
    contract as the embeddings': average it over ranks, as DDP does for a module that holds this one.
    """

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
    ):
        super().__init__()
        if not (isinstance(temperature, Real) and 0 < float(temperature) < math.inf):
            raise ValueError(f"temperature must be a positive number to start from, got {temperature!r}")
        if negatives not in checks.NEGATIVES:
            raise ValueError(f"negatives must be {checks.one_of(checks.NEGATIVES)}, got {negatives!r}")
        if impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl must be {checks.one_of(IMPLEMENTATIONS)}, got {impl!r}")
        self._fixed_temperature = temperature = float(temperature)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature))) if learnable else None
        self.negatives, self.impl, self.group, self.objective, self.chunk_mib = (
            negatives,
            impl,
            group,
            objective,
            chunk_mib,
        )

    @property
    def temperature(self) -> float | Tensor:
        """The temperature in use: a float, or a 0-d tensor that requires grad if it is learnable."""
        return self._fixed_temperature if self.log_temperature is None else self.log_temperature.exp()

    def forward(
        self,
        queries: Tensor,
        passages: Tensor,
        *,
        positives: Tensor | None = None,
        false_negatives: FalseNegatives | None = None,
        stats: LossStats | None = None,
    ) -> Tensor:
        """The loss of queries [B, D] and passages [M, D], 0-d: `info_nce` with what the module holds."""
        return info_nce(
            queries,
            passages,
            positives=positives,
            temperature=self.temperature,
            false_negatives=false_negatives,
            negatives=self.negatives,
            impl=self.impl,
            group=self.group,
            objective=self.objective,
            chunk_mib=self.chunk_mib,
            stats=stats,
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
