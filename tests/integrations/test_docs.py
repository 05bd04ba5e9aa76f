"""The code of docs/integrations.md, as it stands there, has the gradient of one process."""

import copy
import importlib
import os
import re

import accelerate
import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from inbatch import GradCache, collectives, info_nce, max_over_ranks
from inbatch.testing import assert_gradient_parity
from tests.grad_cache.test_step import Tower, cross_entropy, random_batch
from tests.helpers import REPOSITORY

TEXT = (REPOSITORY / "docs" / "integrations.md").read_text()
BLOCKS = dict(re.findall(r"```python\n# (.*?)\n(.*?)```", TEXT, re.DOTALL))

NAMES = {
    "Accelerator": accelerate.Accelerator,
    "DataLoader": DataLoader,
    "GradCache": GradCache,
    "Trainer": Trainer,
    "TrainingArguments": TrainingArguments,
    "fully_shard": fully_shard,
    "info_nce": info_nce,
    "max_over_ranks": max_over_ranks,
}


ROWS = 12


def check_step(rank: int, title: str, size: int) -> None:
    names = dict(NAMES)
    exec(BLOCKS[title], names)
    sizes = [4, 3, 5][:size]
    batches = [(random_batch(n, 8, seed=2 * k), random_batch(n, 16, seed=2 * k + 1)) for k, n in enumerate(sizes)]
    wrap = DistributedDataParallel if title.startswith("ddp") else None
    assert_gradient_parity(names["step"], Tower(dropout=0.0), batches, reference=one_process, wrap=wrap)


def one_process(model, batch):
    loss = cross_entropy(model(batch[0]), model(batch[1]))
    loss.backward()
    return loss


def check_fit(rank: int, title: str, accumulations: tuple[int, ...], folder: str) -> None:
    """One optimizer step of SGD at rate 1 moves the weights by the gradient: on two ranks as in one process."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", TORCHELASTIC_RUN_ID="0")  # the group is there
    sides = random_batch(ROWS, 8, seed=0), random_batch(ROWS, 16, seed=1)

    def features(rows):
        queries, passages = ({name: value[rows] for name, value in side.items()} for side in sides)
        return {"queries": queries, "passages": passages}

    def collate(rows):
        seen.append(list(rows))
        return features(rows)

    names = {**NAMES, "collate": collate}
    if title == "lightning":
        names |= {"lightning": (module := importlib.import_module(title)), "LightningModule": module.LightningModule}
    exec(BLOCKS[title], names)
    for accumulation in accumulations:
        start, seen = Tower(dropout=0.0), []
        expected, model = copy.deepcopy(start), copy.deepcopy(start)
        try:
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            names["fit"](model, optimizer, range(ROWS), ROWS // 2 // accumulation, accumulation, folder)
        finally:
            accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        by_part = zip(*collectives.gather_objects(seen), strict=True)
        parts = [features([row for rows in part for row in rows]) for part in by_part]
        assert len(parts) == accumulation
        for part in parts:
            (cross_entropy(expected(part["queries"]), expected(part["passages"])) / accumulation).backward()
        scale = max(p.grad.abs().max() for p in expected.parameters())
        for before, after, one in zip(start.parameters(), model.parameters(), expected.parameters(), strict=True):
            assert (before - after - one.grad).abs().max() <= 1e-5 * scale, accumulation


STEPS = [title for title, code in BLOCKS.items() if "def step(" in code]
LOOPS = [title for title, code in BLOCKS.items() if "def fit(" in code]


@pytest.mark.parametrize(("title", "size"), [*((title, 2) for title in STEPS), (STEPS[1], 3)])
def test_the_steps_of_the_docs_are_exact(pool, title, size):
    pool.run(check_step, size, title, size, timeout_s=120)


@pytest.mark.parametrize("title", LOOPS)
def test_the_loops_of_the_docs_are_exact(pool, title, tmp_path):
    """With GradCache, without accumulation and over two parts."""
    assert len(STEPS) + len(LOOPS) == 6
    assert len(BLOCKS[title].splitlines()) <= 25
    if title == "lightning":
        pytest.importorskip(title)  # a dozen packages: not in the extra dev
    pool.run(check_fit, 2, title, (1, 2), str(tmp_path), timeout_s=200)
