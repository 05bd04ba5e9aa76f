"""The pages' Python runs as it stands there, and their commands parse. tests/integrations has docs/integrations.md."""

import re
import shlex

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from inbatch import info_nce
from inbatch.cli import _parse, _parse_train
from inbatch.train.config import Config, DataConfig, ModelConfig, TrainConfig, flatten
from tests.grad_cache.test_step import Tower, random_batch
from tests.helpers import REPOSITORY
from tests.tiny_models import save_tiny

PAGES = {path.name: path.read_text() for path in [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]}
BLOCKS = {name: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for name, text in PAGES.items()}
SETTINGS = flatten(
    Config(model=ModelConfig(name_or_path="x"), data=DataConfig(train="x"), train=TrainConfig(output_dir="x"))
)


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.passage = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, batch):
        return self.query(batch[0]), self.passage(batch[1])


def one_process(model, batch):
    queries, passages = model(batch)
    loss = F.cross_entropy(queries @ passages.T, torch.arange(len(queries)))
    loss.backward()
    return loss


def check_pages(rank: int) -> None:
    torch.manual_seed(rank)
    model = DistributedDataParallel(Tower(dropout=0.0))
    sides = [random_batch(4, width, seed=rank) for width in (8, 16)]
    training = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "accumulation_steps": 2}
    tokens_mask = torch.ones(4, 3)
    given = {
        "README.md": {"encoder": nn.Linear(8, 8), "query_tokens": rows(4, 8), "passage_tokens": rows(8, 8)}
        | {"passage_ids": torch.arange(8)},
        "guide.md": {"queries": rows(4, 8), "passages": rows(8, 8)},
        "false_negatives.md": {"queries": rows(4, 8), "passages": rows(8, 8), "passage_keys": list("abcaefgh")},
        "late_interaction.md": {"queries": rows(4, 3, 8), "passages": rows(4, 3, 8)}
        | {"query_mask": tokens_mask, "passage_mask": tokens_mask},
        "distillation.md": {"q": rows(4, 8), "p": rows(8, 8), "teacher_scores": torch.randn(4, 2)},
        "bigger_batch.md": {**training, "query_batch": sides[0], "passage_batch": sides[1]},
        "training_step.md": {**training, "batches": [sides]},
    }
    elsewhere = {"integrations.md", "tutorial.md", "gradient.md"}
    assert {name for name, blocks in BLOCKS.items() if blocks} == given.keys() | elsewhere
    for page, names in given.items():
        exec("from inbatch import info_nce", names)
        for block in BLOCKS[page]:
            exec(block, names)
        assert names["loss"].isfinite(), page
    names = {"my_loss": lambda model, batch: info_nce(*model(batch), temperature=1.0), "__name__": "imported"}
    exec(BLOCKS["gradient.md"][0], names)  # whose last line, for a script, is this one:
    batches = [(torch.ones(n, 4).cumsum(0) / n, torch.eye(4)[:n]) for n in (3, 2)]
    names["assert_gradient_parity"](names["step"], Pair(), batches, towers=("query", "passage"), reference=one_process)


def test_the_code_of_the_pages_runs_on_two_processes(pool):
    pool.run(check_pages, 2, timeout_s=120)


def test_the_code_of_the_tutorial_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    save_tiny("bert", tmp_path / "runs/quickstart/model")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in BLOCKS["tutorial.md"]:
        exec(block, names)
    assert names["hits"].shape == (1, 500)
    assert "426 queries, 2492 documents" in capsys.readouterr().out


def commands() -> list[tuple[str, str]]:
    blocks = {name: re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for name, text in PAGES.items()}
    lines = [
        (page, one) for page, found in blocks.items() for b in found for one in b.replace("\\\n", " ").splitlines()
    ]
    return [(page, line) for page, line in lines if line.startswith("inbatch ")]


@pytest.mark.parametrize(("page", "line"), commands())
def test_the_commands_of_the_pages_have_these_options(page, line):
    _, command, *arguments = shlex.split(line.split(">")[0], comments=True)
    if command == "train":
        known = _parse_train(arguments)
        overrides = [] if known.from_nemo else known.overrides  # there they have the recipe's names
    else:
        overrides = _parse([command, *arguments]).overrides
    unknown = [name for name in overrides if name.startswith("--") and name[2:] not in SETTINGS]
    assert not unknown, page
