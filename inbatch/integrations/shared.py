"""What the losses for several libraries share; it needs torch alone.

Shapes: B rows, N passages of a row.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from inbatch import collectives
from inbatch.grad_cache import GradCache
from inbatch.losses import FalseNegatives, InfoNCELoss


class TrainerLoss(nn.Module):
    """Hold a model and the InfoNCE loss of the columns that it encodes, as trainers of sentence-transformers do."""

    micro_batch_tokens: int | str = "auto"
    packed = False
    _step: tuple[nn.Module, GradCache] | None = None

    def __init__(
        self,
        model: nn.Module,
        *,
        scale: float | None,
        usual_scale: float,
        gather_across_devices: bool,
        temperature: float | None = None,
        negatives: str | None = None,
        **options: Any,
    ):
        super().__init__()
        if scale is not None and temperature is not None:
            raise ValueError(f"scale is 1 / temperature: give one of them, got {scale=}, {temperature=}")
        if scale is not None and not (isinstance(scale, Real) and scale > 0):
            raise ValueError(f"scale must be a number above 0, got {scale!r}")
        if not gather_across_devices and negatives not in (None, "local"):
            raise ValueError(f"gather_across_devices=False is negatives='local': give one of them, got {negatives=}")
        self.model = model
        self.loss = InfoNCELoss(
            1 / (scale or usual_scale) if temperature is None else temperature,
            negatives=negatives or ("gather" if gather_across_devices else "local"),
            **options,
        )

    def get_config_dict(self) -> dict[str, Any]:
        """Return what the model card says of the loss."""
        temperature = self.loss.temperature
        temperature = temperature.item() if isinstance(temperature, Tensor) else temperature
        return {"temperature": temperature, "negatives": self.loss.negatives, "masks": "by ids"}

    def _cached(
        self,
        encode: Callable[[dict[str, Any]], Tensor],
        loss: Callable[..., Tensor],
        columns: Iterable[Mapping[str, Any]],
        labels: Tensor | None,
    ) -> Tensor:
        """Return the loss of the encoded columns by `GradCache`, where `encode` calls `self.model`."""
        model = self.model
        if self._step is None or self._step[0] is not model:  # a trainer puts its wrapper in place of the model
            sharded = hasattr(model, "set_requires_gradient_sync")
            step = GradCache(
                encode,
                loss,
                modules=[model] if sharded or isinstance(model, DistributedDataParallel) else [],
                micro_batch_tokens=self.micro_batch_tokens,
                packed=self.packed,
                max_over_ranks=collectives.max_over_ranks if sharded else None,
            )
            self._step = model, step
        inputs = [
            {name: value for name, value in column.items() if isinstance(value, (Tensor, int, float, str))}
            for column in columns
        ]
        return self._step[1].loss(*inputs, loss_kwargs={"labels": labels})


def ids_of(labels: Any, rows: int, passages: int) -> FalseNegatives | None:
    """Return what labels [B, N] or [B, 1 + N] say of false negatives; others are named as not used."""
    fits = isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.ndim == 2 and len(labels) == rows
    if not fits or labels.shape[1] not in (passages, passages + 1):
        if labels is not None:
            got = f"{tuple(labels.shape)} {labels.dtype}" if isinstance(labels, Tensor) else type(labels).__name__
            warnings.warn(f"labels {got} are no ids as Collator makes them, and are not used", stacklevel=2)
        return None
    queries = labels[:, 0].contiguous() if labels.shape[1] > passages else None
    return FalseNegatives(passage_ids=labels[:, -passages:].flatten(), query_ids=queries)


def micro_batch_tokens(
    size: int | None, tokens: int | None, longest: int | None, *, show_progress_bar: bool = False
) -> int | str:
    """Return the tokens of a micro-batch: those given, or of so many rows of the longest; "auto" where neither is."""
    if show_progress_bar:
        warnings.warn("show_progress_bar is not used: micro-batches show no progress", stacklevel=3)
    for name, given in (("mini_batch_size", size), ("mini_batch_num_tokens", tokens)):
        if given is not None and (not isinstance(given, int) or given < 1):
            raise ValueError(f"{name} must be an integer of at least 1, or None, got {given!r}")
    if size and not tokens and not longest:
        raise ValueError("mini_batch_size needs a model that limits the length of its texts: set mini_batch_num_tokens")
    return tokens or (size * longest if size and longest else "auto")
