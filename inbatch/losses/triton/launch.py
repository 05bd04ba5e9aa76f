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
    device = torch.cuda.current_device() if not INTERPRETED else -1
    key: list[Any] = [id(kernel), device, *constants.values()]
    values: list[Any] = []
    _describe(arguments, key, values)
    key_of_call = tuple(key)
    compiled = _launchable.get(key_of_call)
    if compiled is None:
        _launchable[key_of_call] = kernel[(grid,)](*arguments, **constants, **options)
        return
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    # A profiler, say, listens to launches. An empty chain of hooks counts as none.
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
        compiled[(grid, 1, 1)](*values, *constants.values())
    else:  # the same without the preparation for hooks, which takes half of the time
        stream, metadata = driver.active.get_current_stream(device), compiled.packed_metadata
        hooks = None, None, None
        compiled.run(grid, 1, 1, stream, compiled.function, metadata, *hooks, *values, *constants.values())


def _describe(arguments: tuple, key: list[Any], values: list[Any]) -> None:
    """Append what Triton specialises a kernel on to `key`, and what the compiled kernel takes to `values`."""
    for argument in arguments:
        kind = argument.__class__
        if kind is int:
            key.append((argument % 16 == 0) + 2 * (argument == 1) + 4 * (argument >= 2**31))
            values.append(argument)
        elif kind is float:
            key.append(float)
            values.append(argument)
        elif kind is tuple:
            inner: list[Any] = []
            _describe(argument, key, inner)
            key.append(len(inner))
            values.append(tuple(inner))
        elif isinstance(argument, Tensor):
            address = argument.data_ptr()
            key.append(argument.dtype)
            key.append(address % 16 == 0)
            values.append(address)
        else:  # a tensor descriptor
            key.append(argument.base.dtype)
            key.extend(argument.block_shape)
            values.append(argument)
