"""AdamW's parameter groups, the learning rate as a function of the step, and clipping."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from inbatch.train.config import OptimConfig


def build_optimizer(modules: Sequence[nn.Module], config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over all trainable parameters; norms and biases (1-d) decay if the settings ask, scalars never."""
    smallest = 1 if config.decay_all else 2
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in alike if (p.ndim >= smallest) == decayed], "weight_decay": decayed * config.weight_decay}
        for alike in plain_and_sharded(parameters)
        for decayed in (True, False)
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Return the rate of optimizer step `step` (from 0): linear up to `lr`, then down to `min_lr` by `schedule`."""
    warmup = round(config.warmup_ratio * total_steps) if config.warmup_steps is None else config.warmup_steps
    if step < warmup:
        if config.init_lr is None:
            return config.lr * (step + 1) / warmup
        return config.init_lr + (config.lr - config.init_lr) * step / warmup
    if config.schedule == "constant":
        return config.lr
    end = total_steps if config.decay_steps is None else config.decay_steps
    left = max(0.0, (end - step) / max(1, end - warmup))
    share = left if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * (1 - left)))
    return config.min_lr + (config.lr - config.min_lr) * share


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale all gradients so that their global norm is at most `max_norm` (None: only measure it); return the norm."""
    kinds = plain_and_sharded([p for p in parameters if p.grad is not None])
    norms = [torch.nn.utils.get_total_norm([p.grad for p in alike if p.grad is not None]) for alike in kinds]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if max_norm is not None:
        for alike in kinds:
            torch.nn.utils.clip_grads_with_norm_(alike, max_norm, norm)
    return norm


def plain_and_sharded(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return the parameters in groups that one fused operation may take: those that FSDP2 shards, and the others."""
    kinds = [[p for p in parameters if isinstance(p, DTensor) == sharded] for sharded in (False, True)]
    return [kind for kind in kinds if kind]
