"""The precision that an encoder computes in: float32, bfloat16 copies of its weights, or autocast's casts.

Copies keep everything in bfloat16, the residual stream and layer norms included, as under FSDP2; autocast keeps
these in float32, which is slower and closer to float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

PRECISIONS = ("fp32", "bf16", "autocast")


def chosen(precision: str, device: torch.device) -> str:
    """Return which of PRECISIONS a setting means: "auto" is autocast on GPUs and fp32 on CPUs."""
    if precision != "auto":
        return precision
    return "autocast" if device.type == "cuda" else "fp32"


@contextmanager
def bf16_copies(*modules: nn.Module) -> Iterator[None]:
    """Let modules hold bfloat16 copies of their float32 parameters inside, to be used forward and backward.

    A copy is made once, as a function of its parameter: gradients pass through the cast and add up in the parameter's
    float32 `.grad`. Buffers stay as they are. An optimizer, DDP's reduction and whatever else wants the parameters
    themselves comes after it. Within another one, or where parameters are bfloat16 already, it changes nothing.
    """
    held = {
        (owner, name): parameter
        for module in modules
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and parameter.dtype == torch.float32
    }
    # With a graph under no_grad, too: what is compiled for one kind of weights serves both. Shared ones stay shared.
    with torch.enable_grad():
        copies: dict[nn.Parameter, Tensor] = {p: p.to(torch.bfloat16) for p in dict.fromkeys(held.values())}
    try:
        for (owner, name), parameter in held.items():
            owner._parameters[name] = copies[parameter]  # type: ignore[assignment]
        yield
    finally:
        for (owner, name), parameter in held.items():
            owner._parameters[name] = parameter
