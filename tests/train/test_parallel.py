"""Sharded training, LoRA, separate towers, the loss's settings: alone and together, on real process groups.

Shapes: B texts, D dimension.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from inbatch import BiEncoderModel, cli
from inbatch.data import load_retrieval
from inbatch.encoder.lora import add_lora, has_lora, merge_lora
from inbatch.grad_cache.memory import PassState, graph_bytes
from inbatch.retrieval.evaluate import evaluate
from inbatch.train.config import CheckpointConfig, Config, EvalConfig, LoraConfig, LossConfig, ModelConfig, TrainConfig
from inbatch.train.config_file import load
from inbatch.train.loop import train
from inbatch.train.parallel import compile_layers, gathered, shard, transformer_layers, whole_state
from inbatch.train.run_folder import read_metrics
from inbatch.train.towers import export
from tests.helpers import REPOSITORY, device
from tests.tiny_models import CONFIGS, TEXTS, save_tiny
from tests.train.test_loop import assert_close, folder, make_config  # noqa: F401


def train_body(rank: int, config: Config) -> dict[str, float]:
    return train(config, device=device())


def run_on(pool, world_size: int, config: Config) -> list[float]:
    """The losses by step."""
    pool.run(train_body, world_size, config)
    return [line["loss"] for line in read_metrics(config.train.output_dir) if "loss" in line]


def weights(config: Config, tower: str = "") -> dict[str, torch.Tensor]:
    return saved(config, tower).state_dict()


def saved(config: Config, tower: str = "") -> BiEncoderModel:
    return BiEncoderModel.from_pretrained(Path(config.train.output_dir) / "model" / tower)


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
def test_a_sharded_run_goes_on_with_other_ranks_and_is_exported(pool, folder, tmp_path, capsys, lora):  # noqa: F811
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
    assert cli.run(["export", str(tmp_path / "parts"), str(tmp_path / "exported")]) == 0
    assert "step-00000006" in capsys.readouterr().out
    with pytest.raises(ValueError, match="exists already"):
        export(tmp_path / "parts", tmp_path / "exported")
    with pytest.raises(ValueError, match="neither a run with checkpoints nor a checkpoint"):
        export(tmp_path / "exported", tmp_path / "again")
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


@pytest.mark.parametrize(
    ("world_size", "parallel", "freeze", "r"),
    [(2, "ddp", None, None), (2, "ddp", "query", None), (2, "fsdp2", "passage", None), (2, "fsdp2", "query", 2)],
)
def test_separate_towers(pool, folder, tmp_path, capsys, world_size, parallel, freeze, r):  # noqa: F811
    """One frozen or none: as one process trains them; each is saved apart, and each embeds its own side."""

    def config(name: str, parallel: str, steps: int) -> Config:
        base = make_config(
            folder,
            tmp_path / name,
            model={"separate_towers": True, "freeze": freeze},
            train={"max_steps": steps, "parallel": parallel},
            optim={"schedule": "constant", "warmup_ratio": 0.0},
            eval=vars(EvalConfig(data=str(folder / "beir"))),
            checkpoint=vars(CheckpointConfig(every_steps=2)),
        )
        return replace(base, lora=replace(base.lora, r=r))

    one = config("one", "ddp", 3)
    figures = train(one)
    shared = train(make_config(folder, tmp_path / "shared", train={"max_steps": 1}))
    assert read_metrics(tmp_path / "one")[1]["loss"] == pytest.approx(shared["loss"], abs=1e-6), "alike at the start"
    run_on(pool, world_size, config("many", parallel, 2))
    run_on(pool, world_size, many := config("many", parallel, 3))
    start = BiEncoderModel.from_pretrained(folder / "model").state_dict()
    towers = {name: weights(many, name) for name in ("query", "passage")}
    for name, tower in towers.items():
        assert_close(tower, weights(one, name), atol=1e-5)
        moved = max((tower[key] - start[key]).abs().max() for key in start)
        assert moved == 0 if name == freeze else moved > 1e-4
    assert any((towers["query"][key] - towers["passage"][key]).abs().max() > 1e-4 for key in start)
    again = evaluate(
        saved(one, "passage"), load_retrieval(folder / "beir", "dev"), query_model=saved(one, "query"),
        measures=("nDCG@10", "RR@10"),
    )  # fmt: skip
    assert again == pytest.approx({name: figures[f"eval_{name}"] for name in again}, abs=1e-6)
    if freeze is None:
        arguments = [
            "evaluate",
            str(tmp_path / "one" / "model"),
            str(folder / "beir"),
            "--split",
            "dev",
            "--device",
            "cpu",
        ]
        assert cli.run([*arguments, "--no-progress", "--measures", "nDCG@10", "RR@10"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == pytest.approx(again, abs=1e-6)


@pytest.mark.parametrize(
    "groups",
    [
        {"model": {"packed": True}},
        {"model": {"packed": True, "gradient_checkpointing": True}, "train": {"parallel": "fsdp2"}},
        {"loss": {"objective": "clip"}},
        {"loss": {"objective": "gte", "matryoshka_dims": [32, 8]}, "train": {"parallel": "fsdp2"}},
        {"loss": {"objective": "qwen3_embedding", "margin": 0.1}, "model": {"separate_towers": True}},
    ],
    ids=lambda groups: " ".join(f"{key}={value}" for values in groups.values() for key, value in values.items()),
)
def test_settings_give_one_process_s_losses(pool, folder, tmp_path, groups):  # noqa: F811
    runs = {}
    for name, changes in {"plain": {}, "one": groups, "many": groups}.items():
        settings = {**changes, "train": {**changes.get("train", {}), "max_steps": 3}}
        if name != "many":
            settings["train"]["parallel"] = "ddp"
        config = make_config(folder, tmp_path / name, **settings)
        pool.run(train_body, 2 if name == "many" else 1, config)
        runs[name] = [line["loss"] for line in read_metrics(config.train.output_dir)]
    assert runs["many"] == pytest.approx(runs["one"], abs=1e-5)
    # Packing changes nothing, an objective changes the loss.
    assert (runs["one"] == pytest.approx(runs["plain"], abs=1e-5)) == ("loss" not in groups)


def test_bfloat16_sharded_keeps_float32_weights(pool, folder, tmp_path):  # noqa: F811
    """Steps smaller than bfloat16 resolves are not lost."""
    config = make_config(
        folder,
        tmp_path,
        train={"parallel": "fsdp2", "precision": "bf16", "max_steps": 3},
        optim={"lr": 1e-6, "warmup_ratio": 0.0},
    )
    losses = run_on(pool, 2, config)
    exact = run_on(pool, 1, replace(config, train=replace(config.train, precision="fp32", output_dir=f"{tmp_path}/x")))
    assert losses == pytest.approx(exact, rel=0.05)
    assert losses != pytest.approx(exact, abs=1e-6)
    start = BiEncoderModel.from_pretrained(config.model.name_or_path).state_dict()
    changed = {name: (value - start[name]).abs().max() for name, value in weights(config).items()}
    assert all(0 < change < 1e-5 for name, change in changed.items() if "pooler" not in name and "key.bias" not in name)


# ---- the parts


def uneven_passes(rank: int, folder: str) -> None:  # noqa: F811
    plain, sharded = (BiEncoderModel.from_pretrained(folder).to(device()) for _ in range(2))
    shard(sharded, device(), bf16=False)
    batch = {name: value.to(device()) for name, value in plain.tokenize(TEXTS).items()}
    for _ in range(2):
        with gathered([sharded]), torch.no_grad():
            for _ in range(rank + 1):
                torch.testing.assert_close(sharded(batch), plain(batch))
        # Then it trains on, sharded.
        for model in (plain, sharded):
            model(batch)[:, 0].sum().backward()
    gradients = [
        (p.grad, q.grad.full_tensor())
        for p, q in zip(plain.parameters(), sharded.parameters(), strict=True)
        if p.requires_grad
    ]
    assert gradients
    for expected, actual in gradients:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    state = whole_state(sharded)
    assert state.keys() == (plain.state_dict().keys() if rank == 0 else set())
    for name, value in state.items():
        assert value.device.type == "cpu"
        assert torch.equal(value, plain.state_dict()[name].cpu())


def test_ranks_encode_unequally_often_where_parameters_are_gathered(pool, folder):  # noqa: F811
    pool.run(uneven_passes, 3, str(folder / "model"))


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_layers_are_found_and_lora_merges_to_the_same_embeddings(tmp_path, kind):
    model = BiEncoderModel.from_pretrained(save_tiny(kind, tmp_path)).eval()
    layers = transformer_layers(model.backbone)
    assert len(layers) == 2
    assert all("Layer" in type(layer).__name__ for layer in layers)
    batch = model.tokenize(TEXTS)
    before_BD = model(batch)
    add_lora(model, r=2, alpha=8)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("lora_" in name and "pooler" not in name for name in trainable)
    assert torch.equal(model(batch), before_BD), "it starts as the model was"
    assert transformer_layers(model.backbone) == layers
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    with_lora_BD = model(batch)
    assert (with_lora_BD - before_BD).abs().max() > 1e-3
    if kind == "bert":
        model.save_pretrained(tmp_path / "saved")
    merge_lora(model)
    assert not has_lora(model)
    torch.testing.assert_close(model(batch), with_lora_BD, rtol=0, atol=1e-5)
    if kind == "bert":  # the adapter that lies there is not put on top of the merged weights
        model.backbone.embeddings.word_embeddings.weight.data *= 2
        model.save_pretrained(tmp_path / "saved")
        again = BiEncoderModel.from_pretrained(tmp_path / "saved").eval()
        torch.testing.assert_close(again(batch), model(batch), rtol=0, atol=1e-5)


def test_lora_names_what_does_not_fit(tmp_path):
    model = BiEncoderModel.from_pretrained(save_tiny("bert", tmp_path))
    with pytest.raises(ValueError, match=r"lora.target_modules \['q_proj'\] does not fit this backbone"):
        add_lora(model, r=2, alpha=8, target_modules=["q_proj"])


def test_large_compiled_layers_keep_less_and_compute_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("inbatch.train.parallel.LARGE", 0)
    texts = {"input_ids": torch.tensor([[5, 6, 7, 8]] * 8), "attention_mask": torch.ones(8, 4, dtype=torch.int64)}
    plain, compiled = (BiEncoderModel.from_pretrained(save_tiny("qwen3", tmp_path)).train() for _ in range(2))
    compile_layers(compiled)
    held = []
    for model in (plain, compiled):
        output_BD, size = graph_bytes(partial(model, texts), PassState())
        held.append(size)
        output_BD[:, 0].sum().backward()
    assert held[1] < 0.5 * held[0]
    for expected, actual in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-3, atol=1e-5)


def test_compiled_layers_compute_the_same_and_replay_dropout(tmp_path, monkeypatch):
    monkeypatch.setattr("inbatch.train.parallel.LARGE", 0)
    plain, compiled = (
        BiEncoderModel.from_pretrained(save_tiny("bert", tmp_path, hidden_dropout_prob=0.1)) for _ in range(2)
    )
    compile_layers(compiled)
    for length in (5, 9):
        ids_BT = torch.randint(4, 20, (3, length))
        batch = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
        outputs = []
        for grad in (False, True):
            torch.manual_seed(1)
            with torch.set_grad_enabled(grad):
                outputs.append(compiled.train()(batch))
        assert (outputs[0] - plain(batch)).abs().max() > 1e-2, "dropout is on"
        torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-6)
        if length == 9:  # what a backward pass computes again must drop the same
            weights = [parameter for parameter in compiled.parameters() if parameter.requires_grad]
            gradients = torch.autograd.grad(outputs[1][:, 0].sum(), weights)
            along = [torch.randn_like(weight) for weight in weights]
            slope = sum((gradient * by).sum() for gradient, by in zip(gradients, along, strict=True))
            sums = []
            for move in (5e-4, -1e-3, 5e-4):
                with torch.no_grad():
                    for weight, by in zip(weights, along, strict=True):
                        weight.add_(by, alpha=move)
                torch.manual_seed(1)
                sums.append(compiled(batch)[:, 0].sum().detach())
            torch.testing.assert_close(slope, (sums[0] - sums[1]) / 1e-3, rtol=1e-2, atol=1e-3)
        expected_BD, actual_BD = plain.eval()(batch), compiled.eval()(batch)
        torch.testing.assert_close(actual_BD, expected_BD, rtol=0, atol=1e-5)
        for output_BD in (expected_BD, actual_BD):
            output_BD[:, 0].sum().backward()
    for expected, actual in zip(plain.parameters(), compiled.parameters(), strict=True):
        if expected.requires_grad:
            torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig(name_or_path="m", freeze="query"), "there is one encoder for both"),
        (lambda: ModelConfig(name_or_path="m", packed=True, attn_implementation="sdpa"), "brings its own attention"),
        (lambda: LoraConfig(r=0), "lora.r is 0"),
        (lambda: LoraConfig(r=4, target_modules=[]), "lora.target_modules is empty"),
        (lambda: LossConfig(matryoshka_dims=[8, 8]), r"loss.matryoshka_dims is \[8, 8\]: expected different"),
        (lambda: TrainConfig(output_dir="r", reshard=False), "set train.parallel to fsdp2"),
        (lambda: TrainConfig(output_dir="r", parallel="fsdp2", precision="autocast"), "set it to bf16"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_example_configuration_is_valid():
    config = load(REPOSITORY / "configs" / "qwen3_lora_fsdp2.yaml")
    assert (config.lora.r, config.train.parallel, config.loss.objective) == (16, "fsdp2", "qwen3_embedding")
    assert load(None, [f"--{key}={value}" for key, value in (("model.name_or_path", "m"), ("data.train", "d"),
        ("train.output_dir", "r"), ("lora.r", 4), ("lora.target_modules", "[q_proj, v_proj]"),
        ("loss.matryoshka_dims", "[64, 32]"))]).lora.target_modules == ["q_proj", "v_proj"]  # fmt: skip
