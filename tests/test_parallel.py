"""Sharded training, LoRA, separate towers, the loss's settings: alone and together, on real process groups.

Shapes: B texts, D dimension.
"""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from inbatch import BiEncoderModel, checkpoint, collectives
from inbatch.config import CheckpointConfig, Config, EvalConfig
from inbatch.lora import add_lora, has_lora, merge_lora
from inbatch.parallel import gathered, shard, transformer_layers, whole_state
from inbatch.run_log import read_metrics
from inbatch.towers import export
from inbatch.train import train
from tests.helpers import device
from tests.test_train import assert_close, folder, make_config  # noqa: F401
from tests.tiny_models import CONFIGS, TEXTS, save_tiny


def train_body(rank: int, config: Config) -> dict[str, float]:
    return train(config, device=device())


def run_on(pool, world_size: int, config: Config) -> list[float]:
    """The losses by step."""
    pool.run(train_body, world_size, config)
    return [line["loss"] for line in read_metrics(config.train.output_dir) if "loss" in line]


def weights(config: Config, tower: str = "") -> dict[str, torch.Tensor]:
    return BiEncoderModel.from_pretrained(Path(config.train.output_dir) / "model" / tower).state_dict()


# ---- the trainer


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("parallel", "world_size", "settings"),
    [
        ("ddp", 2, {}),
        ("fsdp2", 1, {"reshard": False}),
        ("fsdp2", 2, {}),
        ("fsdp2", 3, {"micro_batch_tokens": 40, "keep_graph_mib": 0, "reshard": False}),
    ],
)
def test_a_spread_model_trains_as_one_process_does(pool, folder, tmp_path, parallel, world_size, settings, lora):  # noqa: F811
    """The same losses, evaluations and parameters, a learnable temperature and gradient checkpointing included."""

    def config(name: str, **train_settings) -> Config:
        base = make_config(
            folder,
            tmp_path / name,
            loss={"learnable_temperature": True},
            model={"gradient_checkpointing": True},
            train={"max_steps": 3, **train_settings},
            # 9 queries and 30 documents: ranks embed unequally many batches.
            eval=vars(EvalConfig(data=str(folder / "beir"), every_steps=2)),
        )
        return replace(base, lora=replace(base.lora, r=2, dropout=0.0)) if lora else base

    one, many = config("one"), config("many", parallel=parallel, **settings)
    train(one)
    pool.run(train_body, world_size, many)
    assert_close(weights(one), weights(many), atol=1e-5)
    lines = [read_metrics(run.train.output_dir) for run in (one, many)]
    for mine, theirs in zip(*lines, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    start = BiEncoderModel.from_pretrained(one.model.name_or_path).state_dict()
    moved = {name for name, value in weights(one).items() if (value - start[name]).abs().max() > 1e-4}
    assert len(moved) > 8, "the comparison means something only if training moves the weights"
    if lora:
        assert all("attention" in name or "dense" in name for name in moved)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_sharded_run_goes_on_with_other_ranks_and_is_exported(pool, folder, tmp_path, lora):  # noqa: F811
    def config(name: str, steps: int, **train_settings) -> Config:
        base = make_config(
            folder,
            tmp_path / name,
            model={"name_or_path": str(folder / "model")},
            train={"max_steps": steps, "parallel": "fsdp2", **train_settings},
            optim={"schedule": "constant", "warmup_ratio": 0.0},
            checkpoint=vars(CheckpointConfig(every_steps=2)),
        )
        return replace(base, lora=replace(base.lora, r=2)) if lora else base

    whole = run_on(pool, 2, config("whole", 6))
    losses = run_on(pool, 2, config("parts", 2))
    assert sorted(path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()) == ["step-00000002"]
    run_on(pool, 1, config("parts", 4))
    losses = run_on(pool, 3, config("parts", 6, parallel="fsdp2"))
    assert losses == pytest.approx(whole, rel=1e-6)
    assert_close(weights(config("whole", 6)), weights(config("parts", 6)), atol=1e-5)

    # The newest checkpoint is the final model: made by one process of what three wrote.
    assert export(tmp_path / "parts", tmp_path / "exported").name == "step-00000006"
    exported = BiEncoderModel.from_pretrained(tmp_path / "exported")
    assert_close(exported.state_dict(), weights(config("parts", 6)), atol=1e-7)
    theirs = pytest.importorskip("sentence_transformers").SentenceTransformer(str(tmp_path / "exported"), device="cpu")
    expected_BD = exported.eval()(exported.tokenize(TEXTS))
    actual_BD = theirs.encode(TEXTS, convert_to_tensor=True)
    real = [0, 2, 3]  # sentence-transformers has no embedding for a text without tokens
    torch.testing.assert_close(actual_BD[real], expected_BD[real], rtol=0, atol=1e-5)


def test_a_run_changes_from_ddp_to_fsdp2_and_back(pool, folder, tmp_path):  # noqa: F811
    def config(name: str, steps: int, parallel: str) -> Config:
        return make_config(
            folder,
            tmp_path / name,
            train={"max_steps": steps, "parallel": parallel},
            optim={"schedule": "constant", "warmup_ratio": 0.0},
            checkpoint=vars(CheckpointConfig(every_steps=1, keep_last=1)),
        )

    whole = run_on(pool, 1, config("whole", 5, "ddp"))
    for steps, world_size, parallel in ((2, 2, "ddp"), (3, 2, "fsdp2"), (5, 3, "ddp")):
        losses = run_on(pool, world_size, config("parts", steps, parallel))
    assert losses == pytest.approx(whole, abs=1e-5)
