"""Training: the same parameters as one process with the whole batch, runs that go on where they were killed.

Shapes: B queries, M passages, N passages of the global batch, D dimension.
"""

import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from inbatch.data import BatchPlan, Collator, Mixture, open_examples
from inbatch.data.batches import Batches
from inbatch.encoder.model import BiEncoderModel
from inbatch.retrieval.evaluate import evaluate
from inbatch.train import checkpoint
from inbatch.train.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    dump,
)
from inbatch.train.loop import train
from inbatch.train.optim import build_optimizer, clip_gradients, learning_rate
from inbatch.train.report import Stopwatch
from inbatch.train.run_folder import read_metrics
from inbatch.train.setup import open_learner, operations
from inbatch.train.towers import open_towers
from tests.helpers import REPOSITORY, device
from tests.tiny_models import WORDS, save_tiny

QUERIES = 26


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("training"))


def write_folder(root: Path) -> Path:
    """Tiny backbones, with and without dropout; records with ragged negatives and duplicates; a BEIR folder."""
    save_tiny("bert", root / "model")
    save_tiny("bert", root / "dropout", hidden_dropout_prob=0.1)
    chance = random.Random(0)

    def text(length: int) -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(2, length)))

    with (root / "records.jsonl").open("w") as file:
        repeated = text(9)
        for i in range(QUERIES):
            positives = [repeated if i % 5 == 0 else text(9) for _ in range(1 + i % 2)]
            record = {"query": text(5), "pos": positives, "neg": [text(9) for _ in range(i % 3)]}
            file.write(json.dumps(record) + "\n")
    beir = root / "beir"
    (beir / "qrels").mkdir(parents=True)
    with (beir / "corpus.jsonl").open("w") as file:
        file.writelines(json.dumps({"_id": f"d{i}", "title": "", "text": text(9)}) + "\n" for i in range(30))
    with (beir / "queries.jsonl").open("w") as file:
        file.writelines(json.dumps({"_id": f"q{i}", "text": text(5)}) + "\n" for i in range(9))
    rows = "".join(f"q{i}\td{3 * i}\t1\n" for i in range(9))
    (beir / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)
    return root


def make_config(folder: Path, output_dir: Path, **groups) -> Config:
    config = Config(
        model=ModelConfig(name_or_path=str(folder / "model")),
        # The pool's workers may not have children; the killed run and `inbatch train` have them.
        data=DataConfig(train=str(folder / "records.jsonl"), query_max_len=8, passage_max_len=12, num_workers=0),
        loss=LossConfig(temperature=0.1),
        # An epsilon above the rounding of gradients that are zero in exact arithmetic: Adam would blow it up to a step.
        optim=OptimConfig(lr=1e-3, eps=1e-5, warmup_ratio=0.4, max_grad_norm=0.5),
        train=TrainConfig(
            output_dir=str(output_dir),
            global_batch_size=8,
            max_steps=5,
            device="cpu",
            precision="fp32",
            log_every=1,
            progress=False,
        ),
    )
    return replace(config, **{name: replace(getattr(config, name), **values) for name, values in groups.items()})


def train_body(rank: int, config: Config) -> dict[str, float]:
    return train(config, device=device())


def trained(config: Config) -> dict[str, torch.Tensor]:
    return BiEncoderModel.from_pretrained(Path(config.train.output_dir) / "model").state_dict()


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], atol: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def by_hand(config: Config) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """Five plain steps of one process: dense scores, torch's own cross entropy, nothing of the trainer's."""
    model = BiEncoderModel.from_pretrained(config.model.name_or_path)
    collate = Collator(
        lambda texts, length: model.tokenize(texts, max_length=length), query_max_len=8, passage_max_len=12
    )
    examples = open_examples(config.data.train)
    plan = BatchPlan(len(examples), 8, config.train.seed)
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, eps=config.optim.eps)
    losses, norms = [], []
    for step, rate in enumerate([0.5e-3, 1e-3, 1e-3, 2e-3 / 3, 1e-3 / 3]):
        batch = collate([examples[int(i)] for i in plan.batch(step)], plan.epoch(step))
        queries_BD, passages_ND = model(batch.queries), model(batch.passages)
        scores_BN = queries_BD @ passages_ND.T / config.loss.temperature
        for i, column in enumerate(batch.positives.tolist()):
            for j, passage in enumerate(batch.passage_ids.tolist()):
                if passage in batch.positive_ids[i].tolist() and j != column:
                    scores_BN[i, j] = -torch.inf
        loss = torch.nn.functional.cross_entropy(scores_BN, batch.positives)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm or torch.inf)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append(loss.item())
    return model.state_dict(), losses, norms


@pytest.fixture(scope="module")
def reference(folder):
    return by_hand(make_config(folder, Path("unused")))


@pytest.mark.parametrize(
    ("world_size", "groups"),
    [
        (1, {}),
        (1, {"train": {"micro_batch_tokens": 40, "keep_graph_mib": 0}}),
        (2, {"train": {"micro_batch_tokens": None}}),
        (2, {"train": {"micro_batch_tokens": 40, "keep_graph_mib": 0}, "model": {"gradient_checkpointing": True}}),
        (3, {}),
        (3, {"loss": {"negatives": "ring"}}),
    ],
)
def test_parameters_equal_a_plain_single_process_run(pool, folder, tmp_path, reference, world_size, groups):
    # 26 records in batches of 8 leave a tail of 2: at W = 3 one rank has no query at all in that step.
    config = make_config(folder, tmp_path, **groups)
    start = BiEncoderModel.from_pretrained(config.model.name_or_path).state_dict()
    pool.run(train_body, world_size, config)
    parameters, losses, norms = reference
    assert_close(trained(config), parameters, atol=1e-5 if device().type == "cpu" else 5e-5)
    lines = read_metrics(tmp_path)
    assert [line["loss"] for line in lines] == pytest.approx(losses, abs=1e-5)
    # Neither clipping nor Adam heeds a wrong scale of the gradient: its norm shows it.
    assert [line["grad_norm"] for line in lines] == pytest.approx(norms, rel=1e-4)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    # The comparison means something only if training moves the parameters much further than the tolerance.
    moved = [(start[name] - parameters[name]).abs().max() for name in start if not name.startswith("backbone.pooler")]
    assert min(moved) > 1e-4 or sum(m > 1e-3 for m in moved) > len(moved) / 2


def test_accumulation_and_temperature_are_equal_on_any_number_of_ranks(pool, folder, tmp_path):
    runs = []
    for world_size in (1, 3):
        config = make_config(
            folder, tmp_path / str(world_size), train={"accumulation_steps": 2}, loss={"learnable_temperature": True}
        )
        pool.run(train_body, world_size, config)
        runs.append((trained(config), read_metrics(config.train.output_dir)))
    (one, one_lines), (three, three_lines) = runs
    assert_close(one, three, atol=1e-5)
    for mine, theirs in zip(one_lines, three_lines, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    temperatures = [line["temperature"] for line in one_lines]
    assert len(set(temperatures)) == 5, "a learnable temperature changes at every step"
    # Half the queries, about half the passages: accumulation adds no negatives.
    assert one_lines[0]["candidates"] < 0.7 * 16


@pytest.mark.parametrize("mixed", [False, True])
def test_a_mixture_is_the_same_on_any_number_of_ranks(pool, folder, tmp_path, mixed):
    path = str(folder / "records.jsonl")
    length = 8 if mixed else 6
    sources = [
        {"path": path, "weight": 2, "negatives": "positives", "query_max_len": length},
        {"path": path, "weight": 1, "negatives": "own", "mask_own_negatives": False, "query_prefix": f"{WORDS[0]} "},
        {"path": str(folder / "beir"), "split": "dev", "weight": 1, "loss_weight": 0.5, "train_n_passages": 1},
    ]
    data = {"train": sources, "mixed_batches": mixed}
    runs = []
    for world_size in (1, 3):
        config = make_config(folder, tmp_path / str(world_size), data=data, train={"max_steps": 12})
        pool.run(train_body, world_size, config)
        runs.append((trained(config), read_metrics(config.train.output_dir)))
    (one, one_lines), (three, three_lines) = runs
    assert_close(one, three, atol=1e-4)
    for mine, theirs in zip(one_lines, three_lines, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
    if not mixed:
        candidates = {
            source: [line["candidates"] for line in one_lines if line["source"] == source] for source in range(3)
        }
        assert len(candidates[0]) == 6
        assert max(candidates[1]) < min(candidates[0]), "its own negatives alone"


def test_queries_without_any_candidate_are_refused(folder, tmp_path):
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"query": "cat", "pos": ["dog"]}\n')
    for source, why in (
        ({"path": str(bare), "negatives": "own"}, "none of 1 records looked at has a hard negative"),
        ({"path": str(folder / "records.jsonl"), "negatives": "own", "train_n_passages": 1}, "train_n_passages is 1"),
    ):
        with pytest.raises(ValueError, match=rf"{source['path']}: negatives is own, and {why}.*: mine negatives"):
            train(make_config(folder, tmp_path / "run", data={"train": [source]}))
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("world_size", [1, 2])
def test_killed_and_resumed_is_the_uninterrupted_run(pool, folder, tmp_path, world_size):
    """Dropout on. metrics.jsonl, evaluations included, is equal byte for byte, and so are the parameters."""

    def config(name: str) -> Config:
        return make_config(
            folder,
            tmp_path / name,
            model={"name_or_path": str(folder / "dropout")},
            train={"max_steps": 40},
            eval=vars(
                EvalConfig(
                    data=str(folder / "beir"),
                    validation={"path": str(folder / "records.jsonl"), "num_samples": 12},
                    every_steps=7,
                    sample_queries=5,
                    sample_documents=12,
                    best_by="validation_loss",
                    keep_best=True,
                    patience=9,
                )
            ),
            checkpoint=vars(CheckpointConfig(every_steps=4, keep_last=2)),
        )

    pool.run(train_body, world_size, config("whole"))
    (tmp_path / "killed.yaml").write_text(dump(config("killed")).replace("num_workers: 0", "num_workers: 1"))
    # The first checkpoint is whole once step 5 is logged, the sixth line: the evaluation of step 0 is one, too.
    kill_at = random.randint(6, 30)
    start_and_kill(tmp_path / "killed.yaml", tmp_path / "killed", world_size, kill_at)
    assert not (tmp_path / "killed" / "done.json").exists()
    assert checkpoint.newest_whole(tmp_path / "killed" / "checkpoints") is not None
    pool.run(train_body, world_size, config("killed"))

    whole, killed = (tmp_path / name / "metrics.jsonl" for name in ("whole", "killed"))
    assert killed.read_text() == whole.read_text(), f"killed at step {kill_at}"
    assert [line["step"] for line in read_metrics(whole.parent) if "loss" in line] == list(range(1, 41))
    assert_close(trained(config("whole")), trained(config("killed")), atol=0)


def start_and_kill(config: Path, output_dir: Path, world_size: int, kill_at: int) -> None:
    """Starts the command and sends SIGKILL to it (or one of its ranks) once `kill_at` lines are in metrics.jsonl."""
    command = [sys.executable, "-m", "inbatch", "train", str(config), "--nproc-per-node", str(world_size)]
    log_path = output_dir.parent / "killed.log"
    with log_path.open("w") as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if len(read_lines(output_dir / "metrics.jsonl")) >= kill_at:
                break
            time.sleep(0.005)
        assert process.poll() is None, log_path.read_text()
        ranks = [pid for pid in pids_of(str(config)) if parent_of(pid) == process.pid]
        os.kill(random.choice(ranks) if world_size > 1 else process.pid, signal.SIGKILL)
        process.wait(60)
    said = [line for line in read_lines(log_path) if "inbatch: error" in line]
    if world_size == 1:
        assert (process.returncode, said) == (-signal.SIGKILL, [])
    else:
        assert process.returncode == 128 + signal.SIGKILL, log_path.read_text()
        assert [line.partition(" rank ")[2][1:] for line in said] == [" was ended by SIGKILL (memory may have run out)"]
    deadline = time.monotonic() + 30
    while pids_of(str(config)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert pids_of(str(config)) == [], "neither a rank nor a process that made its batches outlives it"


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def pids_of(argument: str) -> list[int]:
    """Processes whose command line names this test's own configuration file."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if argument.encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def read_lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_bf16_trains_close_to_fp32(folder, tmp_path):
    losses = {}
    for precision in ("fp32", "bf16", "autocast"):
        config = make_config(folder, tmp_path / precision, train={"precision": precision})
        train(config, device=torch.device("cpu"))
        losses[precision] = [line["loss"] for line in read_metrics(config.train.output_dir)]
    assert losses["bf16"] != losses["fp32"] != losses["autocast"] != losses["bf16"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.03)
    assert losses["autocast"] == pytest.approx(losses["fp32"], rel=0.03)
    assert {parameter.dtype for parameter in trained(config).values()} == {torch.float32}


def test_kept_tokens_change_nothing(folder, tmp_path):
    lines = {}
    for name, kept in (("without", "off"), ("filled", str(tmp_path / "kept")), ("read", str(tmp_path / "kept"))):
        config = make_config(folder, tmp_path / name, data={"token_cache": kept}, train={"max_steps": 9})
        train(config)
        lines[name] = read_lines(tmp_path / name / "metrics.jsonl")
    assert lines["without"] == lines["filled"] == lines["read"]
    assert len(lines["read"]) == 9
    assert {path.suffix for path in (tmp_path / "kept").iterdir()} == {".entries", ".table"}
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data.token_cache is .*not a writable folder"):
        train(make_config(folder, tmp_path / "refused", data={"token_cache": str(tmp_path / "file")}))


def test_a_finished_run_can_be_extended_but_not_replaced(folder, tmp_path, capsys):
    config = make_config(folder, tmp_path, checkpoint={"every_steps": 3})
    first = train(config)
    before = (tmp_path / "metrics.jsonl").read_text()
    assert train(config) == first
    assert "this run is done" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == before

    with pytest.raises(
        ValueError, match=r"another configuration \(train.seed was 42, is 3; optim.lr was 0.001, is 0.5\)"
    ):
        train(replace(config, optim=replace(config.optim, lr=0.5), train=replace(config.train, seed=3)))

    train(replace(config, train=replace(config.train, max_steps=7)))
    assert (tmp_path / "metrics.jsonl").read_text().startswith(before)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]

    (tmp_path / "done.json").unlink()  # as if killed before its end
    with pytest.raises(ValueError, match=r"has a checkpoint of step 7, and the run is to have 5: set train\.max_steps"):
        train(config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_asked_for_and_absent_is_said(folder, tmp_path):
    with pytest.raises(ValueError, match=r"train\.device is cuda but this process has no GPU"):
        train(make_config(folder, tmp_path, train={"device": "cuda"}))
    assert not (tmp_path / "config.yaml").exists()


def test_a_run_goes_on_with_the_data_it_began_with(folder, tmp_path):
    records = tmp_path / "records.jsonl"
    records.write_text((folder / "records.jsonl").read_text())
    data = {"train": str(records)}
    config = make_config(folder, tmp_path / "run", data=data, checkpoint={"every_steps": 1}, train={"max_steps": 1})
    train(config)
    before = records.read_text()
    records.write_text(before.partition("\n")[2])
    longer = replace(config, train=replace(config.train, max_steps=2))
    with pytest.raises(ValueError, match=f"holds {QUERIES - 1} examples, but the run in .* began with {QUERIES}"):
        train(longer)
    records.write_text(before)
    train(longer)

    # What left no checkpoint to go on from begins again, with whatever there is.
    stopped = replace(config, train=replace(config.train, output_dir=str(tmp_path / "stopped")))
    with (
        mock.patch("inbatch.train.loop.save_checkpoint", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        train(stopped)
    records.write_text(before.partition("\n")[2])
    train(stopped)
    assert json.loads((tmp_path / "stopped" / "data.json").read_text()) == {"examples": QUERIES - 1, "ranks": 1}


def test_one_run_at_a_time_writes_to_a_folder(folder, tmp_path):
    """Until its process is gone: neither its lock file nor the workers that it had started keep the next one out."""
    script = (
        "import os, sys, time; from inbatch.train.run_folder import RunFolder\n"
        "with RunFolder(sys.argv[1]).locked():\n"
        "    worker = os.fork()\n"
        "    if worker: print(worker, flush=True)\n"
        "    time.sleep(120)\n"
    )
    config = make_config(folder, tmp_path / "run", train={"max_steps": 1})
    command = [sys.executable, "-c", script, config.train.output_dir]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        worker = int(other.stdout.readline())
        try:
            with pytest.raises(ValueError, match="run is being written to by another run: wait for its end, or choose"):
                train(config)
            assert not (tmp_path / "run" / "config.yaml").exists()
            other.kill()
            other.wait()
            train(config)
        finally:
            other.kill()
            os.kill(worker, signal.SIGKILL)
    assert (tmp_path / "run" / "model").is_dir()


def test_done_without_a_checkpoint_says_so(folder, tmp_path):
    config = make_config(folder, tmp_path, train={"max_steps": 2})
    train(config)
    with pytest.raises(ValueError, match="done after 2 steps and kept no checkpoint"):
        train(replace(config, train=replace(config.train, max_steps=3)))


@pytest.mark.parametrize("every_steps", [None, 3])
def test_an_evaluation_that_fails_at_the_end_costs_no_training(folder, tmp_path, monkeypatch, every_steps):
    def config(name: str) -> Config:
        return make_config(
            folder,
            tmp_path / name,
            eval=vars(EvalConfig(data=str(folder / "beir"), every_steps=3)),
            checkpoint=vars(CheckpointConfig(every_steps=every_steps)),
        )

    train(config("whole"))
    with monkeypatch.context() as patch:
        outcomes = iter([False, False, True])  # at the start, after 3 steps, at the end

        def fails_at_last(*args, **options):
            if next(outcomes):
                raise OSError("no space left")
            return evaluate(*args, **options)

        patch.setattr("inbatch.train.loop.evaluate", fails_at_last)
        with pytest.raises(OSError, match="no space left"):
            train(config("failed"))
    assert_close(trained(config("whole")), trained(config("failed")), atol=0)
    if every_steps:
        assert checkpoint.list_checkpoints(tmp_path / "failed" / "checkpoints")[-1][0] == 5
    assert not (tmp_path / "failed" / "done.json").exists()

    # The same command again evaluates what is missing, and nothing twice.
    train(config("failed"))
    whole, failed = (tmp_path / name / "metrics.jsonl" for name in ("whole", "failed"))
    assert failed.read_text() == whole.read_text()


def test_an_evaluation_cut_off_after_its_checkpoint_is_made_up_for(folder, tmp_path, monkeypatch):
    evaluation = vars(EvalConfig(data=str(folder / "beir"), every_steps=2))
    checkpoints = vars(CheckpointConfig(every_steps=2))
    whole, cut = (
        make_config(folder, tmp_path / name, eval=evaluation, checkpoint=checkpoints) for name in ("whole", "cut")
    )
    train(whole)
    with monkeypatch.context() as patch:
        save = checkpoint.save

        def interrupts(folder, step, **options):
            saving = save(folder, step, **options)
            if step == 4:
                saving.finish()
                raise KeyboardInterrupt
            return saving

        patch.setattr(checkpoint, "save", interrupts)
        with pytest.raises(KeyboardInterrupt):
            train(cut)
    train(cut)
    assert (tmp_path / "cut" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


def test_training_goes_on_while_a_checkpoint_is_written(folder, tmp_path, monkeypatch):
    config = make_config(folder, tmp_path, checkpoint=vars(CheckpointConfig(every_steps=2)), train={"max_steps": 3})
    write, third_step, in_time = checkpoint._write, threading.Event(), []

    def slow(*args):
        in_time.append(third_step.wait(60))
        return write(*args)

    monkeypatch.setattr(checkpoint, "_write", slow)
    train(config, on_figures=lambda step, _: third_step.set() if step == 3 else None)
    assert in_time == [True, True]
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path / "checkpoints")] == [2, 3]


def test_an_exploding_loss_stops_the_run(folder, tmp_path):
    config = make_config(folder, tmp_path, optim={"lr": 1e30, "max_grad_norm": None, "warmup_ratio": 0.0})
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        train(config)


@pytest.mark.parametrize("every_steps", [1, None])
def test_weights_that_diverged_are_not_saved(folder, tmp_path, every_steps):
    """Neither on steps whose loss nobody reads, nor at the end, where no loss would show it any more."""
    config = make_config(
        folder,
        tmp_path,
        optim={"lr": 1e38, "max_grad_norm": None, "warmup_ratio": 0.0, "schedule": "constant"},
        train={"max_steps": 1},
        checkpoint={"every_steps": every_steps},
    )
    with pytest.raises(FloatingPointError, match="the weights are no longer finite after step 1, so they are not"):
        train(config)
    assert not list(tmp_path.rglob("model.safetensors"))
    assert not checkpoint.list_checkpoints(tmp_path / "checkpoints")
    assert not list(tmp_path.rglob("done.json"))


def test_training_time_is_told_apart(folder, tmp_path, capsys):
    clock = Stopwatch()
    clock.turn_to("training")
    with clock.during("evaluation"):
        time.sleep(0.2)
    clock.count(pairs=8)
    assert clock.read()["train_s"] < 0.1 < clock.seconds["evaluation"]

    train(make_config(folder, tmp_path, eval=vars(EvalConfig(data=str(folder / "beir"), every_steps=2))))
    lines = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    steps_s = [line["step_ms"] / 1e3 for line in lines]  # every step is logged
    assert [line["train_s"] for line in lines] == pytest.approx(list(itertools.accumulate(steps_s)))
    summary = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        rf"done, 5 steps: opening \d.* s, training {sum(steps_s):.1f} s, evaluation .* s, saving .* s", summary
    )


def test_learning_rate_and_decay_groups(folder):
    config = OptimConfig(lr=1.0, warmup_ratio=0.2)
    rates = [learning_rate(step, 10, config) for step in range(10)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    assert learning_rate(6, 10, replace(config, schedule="cosine")) == pytest.approx(0.5)
    assert learning_rate(9, 10, replace(config, schedule="constant")) == 1.0
    model = BiEncoderModel.from_pretrained(folder / "model")
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, others = build_optimizer([model], replace(config, weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert all("bias" in names[id(p)] or "LayerNorm" in names[id(p)] for p in others["params"])
    assert all(names[id(p)].endswith("weight") and "LayerNorm" not in names[id(p)] for p in decayed["params"])


def test_clipping_measures_before_it_scales():
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([parameter], None) == 5.0
    assert parameter.grad.tolist() == [3.0, 4.0]
    assert clip_gradients([parameter], 1.0) == 5.0
    assert parameter.grad.norm() == pytest.approx(1.0)


def test_batches_are_the_plan_s_in_order_for_any_ranks(folder):
    examples = open_examples(str(folder / "records.jsonl"))
    plan = Mixture(sizes=(len(examples),), global_batch_size=8, seed=1)
    model = BiEncoderModel.from_pretrained(folder / "model")
    collator = Collator(lambda texts, n: model.tokenize(texts, max_length=n), query_max_len=8, passage_max_len=8)
    options = {"world_size": 3, "accumulation_steps": 3}
    ranks = [
        Batches(examples, plan, collator, rank=rank, **options).ahead_from(2, 6, num_workers=rank) for rank in range(3)
    ]
    for step, by_rank in enumerate(zip(*ranks, strict=True), 2):
        expected = collator([examples[int(i)] for i in plan.batch(step)], plan.epoch(step)).query_ids.tolist()
        parts = list(zip(*by_rank, strict=True))
        assert [id_ for part in parts for share in part for id_ in share.batch.query_ids.tolist()] == expected
        assert sum(part[0].share_of_step for part in parts) == pytest.approx(1)


def test_workers_end_with_a_process_that_still_holds_their_batches():
    code = """
from inbatch.data import Mixture
from inbatch.data.batches import Batches
plan = Mixture(sizes=(99,), global_batch_size=4)
steps = Batches([0] * 99, plan, None, rank=0, world_size=1).ahead_from(0, 20, num_workers=2)
raise SystemExit(3)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=60).returncode == 3


def test_workers_end_with_a_process_that_is_killed():
    code = """
import os, signal, time
from torch.utils.data import DataLoader
from inbatch.data.batches import start_worker
options = {"num_workers": 2, "multiprocessing_context": "fork", "worker_init_fn": start_worker}
large = [[bytes(1 << 22)] for _ in range(9)]  # more than a pipe holds: its writer waits for a reader
steps = iter(DataLoader(large, batch_size=None, collate_fn=lambda value: value, **options))
next(steps)
time.sleep(1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    # The workers have the same standard output: it ends when the last of them does.
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, timeout=60)
    assert done.returncode == -signal.SIGKILL


def test_an_error_while_reading_ahead_is_raised(folder):
    class Broken(list):
        def __getitem__(self, index):
            raise ValueError("records.jsonl, line 3 is not JSON")

    others = {*multiprocessing.active_children()}
    plan = Mixture(sizes=(9,), global_batch_size=4)
    batches = Batches(Broken([0] * 9), plan, collator=None, rank=0, world_size=1)  # type: ignore[arg-type]
    for num_workers in (0, 2):
        with pytest.raises(ValueError, match=r"^records.jsonl, line 3 is not JSON$"):
            next(batches.ahead_from(0, 3, num_workers=num_workers))
    assert {*multiprocessing.active_children()} <= others, "workers end with it"


def test_compiling_is_repaid_by_the_operations_of_the_whole_run(folder, tmp_path):
    config = make_config(folder, tmp_path)
    towers = open_towers(config)
    layers = [m for m in towers["model"].backbone.modules() if isinstance(m, torch.nn.Linear)]
    weights = sum(m.in_features * m.out_features for m in layers)
    assert operations(towers, config, total_steps=5) == 6 * weights * (8 + 2 * 12) * 8 * 5
    compiled = open_learner(config, towers, torch.device("cpu"), total_steps=10**15).compiled
    assert not compiled, "on a GPU alone, unless asked"
