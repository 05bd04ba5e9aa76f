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
    """kernel[(grid,)](*arguments, **constants, **options), remembering what Triton compiles for arguments like these.

    Finding that again takes Triton longer than launching it. `constants` are the kernel's last parameters, in order.
    Like: the same dtypes, alignments and descriptors' blocks, and integers that Triton takes alike. Tensors then go as
    addresses, which saves asking the driver about each.
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
    """Whether somebody, a profiler say, wants to know of launches. Empty chains of hooks are as good as none."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any(getattr(hook, "calls", hook) for hook in hooks)


def _kinds_and_values(arguments: tuple) -> tuple[tuple, tuple]:
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
        elif isinstance(argument, tuple):
            kind, value = _kinds_and_values(argument)
            kinds.append(kind)
        else:  # a tensor descriptor
            kinds += argument.base.dtype, *argument.block_shape
        values.append(value)
    return tuple(kinds), tuple(values)
