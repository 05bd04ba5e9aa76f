"""Launching Triton's kernels with little host time: small batches wait for nothing else."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

driver: Any = None
knobs: Any = None
with suppress(ImportError):
    from triton import knobs
    from triton.runtime import driver

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on the CPU, for tests

_launchable: dict[tuple, Any] = {}


def launch(kernel: Any, grid: int, arguments: tuple, constants: dict[str, Any], **options: int) -> None:
    """Run kernel[(grid,)](*arguments, **constants, **options), remembering the compiled kernel.

    Looking up the compiled kernel costs Triton more than the launch. Calls share an entry if their arguments agree in
    dtype, 16-byte alignment, descriptor block shape and integer specialisation. Tensors then go as addresses, which
    saves asking the driver about each. `constants` are the kernel's last parameters, in order.
    """
    kinds, values = _kinds_and_values(arguments)
    device = torch.cuda.current_device() if not INTERPRETED else -1
    key = id(kernel), device, *kinds, *constants.values()
    compiled = _launchable.get(key)
    if compiled is None:
        _launchable[key] = kernel[(grid,)](*arguments, **constants, **options)
    elif _hooked():
        compiled[(grid, 1, 1)](*values, *constants.values())
    else:  # the same, but for what it prepares for hooks: half of its time
        stream, metadata = driver.active.get_current_stream(device), compiled.packed_metadata
        hooks = None, None, None
        compiled.run(grid, 1, 1, stream, compiled.function, metadata, *hooks, *values, *constants.values())


def _hooked() -> bool:
    """Return True if somebody, a profiler say, wants to know of launches. Empty chains of hooks count as none."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any(getattr(hook, "calls", hook) for hook in hooks)


def _kinds_and_values(arguments: tuple) -> tuple[tuple, tuple]:
    """Return what Triton specialises a kernel on, and what the compiled kernel takes."""
    kinds: list[Any] = []
    values: list[Any] = []
    for argument in arguments:
        value = argument
        if isinstance(argument, Tensor):
            value = argument.data_ptr()
            kinds += argument.dtype, value % 16 == 0
        elif isinstance(argument, int):
            kinds += argument == 1, argument % 16 == 0, argument < 2**31
        elif isinstance(argument, float):
            kinds.append(float)
        elif isinstance(argument, tuple) and argument:
            kind, value = _kinds_and_values(argument)
            kinds.append(kind)
        elif not isinstance(argument, tuple):  # a tensor descriptor
            kinds += argument.base.dtype, *argument.block_shape
        values.append(value)
    return tuple(kinds), tuple(values)
