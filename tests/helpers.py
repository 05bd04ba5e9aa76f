"""Small things that several test modules need."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.pool import BACKEND

REPOSITORY = Path(__file__).resolve().parents[1]


def device() -> torch.device:
    """Where tensors go: the CPU, or in a job of the pool with INBATCH_TEST_BACKEND=nccl the GPU of this rank."""
    on_gpu = BACKEND == "nccl" and torch.distributed.is_initialized()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def data_dir(name: str) -> Path:
    """The folder of a real data set under INBATCH_DATA; the test is skipped where it is absent."""
    folder = Path(os.environ.get("INBATCH_DATA") or REPOSITORY.parent / "shared" / "data") / name
    if not folder.exists():
        pytest.skip(f"the data set {name} is not at {folder}; set INBATCH_DATA to the folder that holds it")
    return folder


def by_one_rank(work):
    """What `work()` returns on rank 0, on every rank: a formula in Python is slow, and the ranks share the cores."""
    result = [work() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(result)
    return result[0]
