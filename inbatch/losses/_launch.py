"""Launching Triton's kernels with little host time: small batches wait for nothing else."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on the CPU, for tests

_launchable: dict[tuple, Any] = {}


def launch(kernel: Any, grid: int, arguments: tuple, constants: dict[str, Any], **options: int) -> None:
    """kernel[(grid,)](*arguments, **constants, **options), remembering what Triton compiles for arguments like these.

    Finding that again takes Triton longer than launching it. `constants` are the kernel's last parameters, in order.
    Like: the same dtypes, alignments and descriptors' blocks, and integers that Triton takes alike.
    """
    key = (
        id(kernel),
        torch.cuda.current_device() if not INTERPRETED else -1,
        *map(_kind, arguments),
        *constants.values(),
    )
    compiled = _launchable.get(key)
    if compiled is None:
        _launchable[key] = kernel[(grid,)](*arguments, **constants, **options)
    else:
        compiled[(grid, 1, 1)](*arguments, *constants.values())


def _kind(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument < 2**31
    if isinstance(argument, float):
        return float
    if isinstance(argument, tuple):
        return tuple(map(_kind, argument))
    return argument.base.dtype, *argument.block_shape  # a tensor descriptor
