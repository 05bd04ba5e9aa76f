"""AdamW's parameter groups, the learning rate as a function of the step, gradients outside the encoder."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from inbatch import collectives
from inbatch.config import OptimConfig


def average_gradients(module: nn.Module) -> None:
    """Averages the gradients of a small module outside the wrapped encoder, as DDP averages the encoder's."""
    for parameter in module.parameters():
        if parameter.grad is not None:
            collectives.all_reduce(parameter.grad).div_(collectives.world_size())


def build_optimizer(modules: Sequence[nn.Module], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over all trainable parameters; norms, biases and scalars (0-d or 1-d) are not decayed."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=all(p.device.type in ("cuda", "cpu") for p in parameters),
    )


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """The rate of optimizer step `step` (from 0): linear from 0 to `lr`, then down to 0 by `schedule`."""
    warmup_steps = round(config.warmup_ratio * total_steps)
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    left = (total_steps - step) / max(1, total_steps - warmup_steps)
    if config.schedule == "constant":
        return config.lr
    return config.lr * (left if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * (1 - left))))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scales all gradients so that their global norm is at most `max_norm` (None: only measures); returns it."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm)
    # FSDP2 shards gradients: the norm then comes as a sharded tensor.
    whole = getattr(norm, "full_tensor", None)
    return norm if whole is None else whole()
