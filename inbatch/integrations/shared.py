"""What the losses for several libraries share; it needs torch alone.

Shapes: B rows, N passages of a row.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from inbatch import collectives
from inbatch.grad_cache import GradCache
from inbatch.losses import FalseNegatives, InfoNCELoss


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


def micro_batch_tokens(size: int | None, tokens: int | None, longest: int | None) -> int | str:
    """Return the tokens of a micro-batch: those given, or of so many rows of the longest; "auto" where neither is."""
    for name, given in (("mini_batch_size", size), ("mini_batch_num_tokens", tokens)):
        if given is not None and (not isinstance(given, int) or given < 1):
            raise ValueError(f"{name} must be an integer of at least 1, or None, got {given!r}")
    if size and not tokens and not longest:
        raise ValueError("mini_batch_size needs a model that limits the length of its texts: set mini_batch_num_tokens")
    return tokens or (size * longest if size and longest else "auto")


def described(loss: InfoNCELoss) -> dict[str, Any]:
    """Return what a model card says of the loss."""
    temperature = loss.temperature.detach() if isinstance(loss.temperature, Tensor) else loss.temperature
    return {"temperature": float(temperature), "negatives": loss.negatives, "masks": "by ids"}


def cached_step(
    model: nn.Module,
    encode: Callable[[dict[str, Any]], Tensor],
    loss: Callable[..., Tensor],
    micro_batch_tokens: int | str,
    *,
    packed: bool = False,
) -> GradCache:
    """Return the step of a trainer's model, in DDP, sharded or plain, which `encode` calls."""
    sharded = hasattr(model, "set_requires_gradient_sync")
    return GradCache(
        encode,
        loss,
        modules=[model] if sharded or isinstance(model, DistributedDataParallel) else [],
        micro_batch_tokens=micro_batch_tokens,
        packed=packed,
        max_over_ranks=collectives.max_over_ranks if sharded else None,
    )
