"""The code of docs/integrations.md, as it stands there, has the gradient of one process."""

import os
import re

import accelerate
import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from inbatch import GradCache, info_nce
from inbatch.testing import assert_gradient_parity
from inbatch.train.parallel import max_over_ranks
from tests.grad_cache.test_step import Tower, cross_entropy, random_batch, rows_of
from tests.helpers import REPOSITORY

BLOCKS = re.findall(r"```python\n# (.*?)\n(.*?)```", (REPOSITORY / "docs" / "integrations.md").read_text(), re.DOTALL)
NAMES = {
    "Accelerator": accelerate.Accelerator,
    "GradCache": GradCache,
    "fully_shard": fully_shard,
    "info_nce": info_nce,
    "max_over_ranks": max_over_ranks,
}


def parts(batch):
    half = len(batch[0]["input_ids"]) // 2
    return [tuple(rows_of(side, *span) for side in batch) for span in ((0, half), (half, 2 * half))]


def one_process(accumulated, model, batch):
    """Rank r's parts are rows of its own: the first parts of all ranks are one global batch."""
    total = 0.0
    rows = torch.arange(len(batch[0]["input_ids"]))
    chosen = [(rows // 2) % 2 == k for k in range(2)] if accumulated and len(rows) > 4 else None
    for keep in chosen or [slice(None)]:
        queries, passages = ({name: value[keep] for name, value in side.items()} for side in batch)
        loss = cross_entropy(model(queries), model(passages)) / len(chosen or [0])
        loss.backward()
        total += loss.detach()
    return total


def check(rank: int, number: int, size: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")  # the group is there already
    title, code = BLOCKS[number]
    names = {**NAMES, "parts": parts}
    exec(code, names)
    accumulated = title.startswith("accelerate")
    sizes = [4] * size if accumulated else [4, 3, 5][:size]
    batches = [(random_batch(n, 8, seed=2 * k), random_batch(n, 16, seed=2 * k + 1)) for k, n in enumerate(sizes)]

    def reference(model, batch):
        return one_process(accumulated, model, batch)

    wrap = DistributedDataParallel if title.startswith("ddp") else None
    try:
        assert_gradient_parity(names["step"], Tower(dropout=0.0), batches, reference=reference, wrap=wrap)
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(("number", "size"), [(n, 2) for n in range(len(BLOCKS))] + [(1, 3)])
def test_the_code_of_the_docs_is_exact(pool, number, size):
    assert len(BLOCKS) == 4
    pool.run(check, size, number, size, timeout_s=120)
