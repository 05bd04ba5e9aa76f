"""What is measured in a run, on any number of ranks, and what follows: the best checkpoint, an early end."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from inbatch.data import BatchPlan, Collator, load_retrieval, open_examples
from inbatch.data.judged import sample
from inbatch.encoder.model import BiEncoderModel
from inbatch.retrieval.evaluate import RetrieveOptions, evaluate
from inbatch.train import checkpoint
from inbatch.train.config import Config, EvalConfig, OptimConfig
from inbatch.train.loop import train
from inbatch.train.optim import learning_rate
from inbatch.train.run_folder import read_metrics
from tests.train.test_loop import assert_close, folder, make_config, train_body  # noqa: F401


def evaluating(folder: Path, output: Path, *, steps: int, lr: float = 3e-3, dropout: bool = True, **values) -> Config:  # noqa: F811
    usual = {"data": str(folder / "beir"), "validation": str(folder / "records.jsonl"), "every_steps": 2}
    return make_config(
        folder,
        output,
        model={"name_or_path": str(folder / ("dropout" if dropout else "model"))},
        optim={"lr": lr, "schedule": "constant"},
        train={"max_steps": steps},
        eval=vars(EvalConfig(**{**usual, **values})),
    )


def by_hand(model: Path, config: Config) -> tuple[float, float, float]:
    """Loss, accuracy and MRR of the held-out records, dense, in batches of 8."""
    encoder = BiEncoderModel.from_pretrained(model).eval()
    collate = Collator(
        lambda texts, length: encoder.tokenize(texts, max_length=length), query_max_len=8, passage_max_len=12
    )
    examples = open_examples(config.eval.validation)
    plan = BatchPlan(len(examples), 8, config.train.seed)
    losses, ranks = [], []
    for step in range(plan.steps_per_epoch):
        batch = collate([examples[int(i)] for i in plan.batch(step)], 0)
        with torch.no_grad():
            scores_BN = encoder(batch.queries) @ encoder(batch.passages).T / config.loss.temperature
        for i, column in enumerate(batch.positives.tolist()):
            for j, passage in enumerate(batch.passage_ids.tolist()):
                if passage in batch.positive_ids[i].tolist() and j != column:
                    scores_BN[i, j] = -torch.inf
        losses += torch.nn.functional.cross_entropy(scores_BN, batch.positives, reduction="none").tolist()
        ranks += (scores_BN >= scores_BN.gather(1, batch.positives[:, None])).sum(1).tolist()
    return tuple(sum(values) / len(losses) for values in (losses, [n == 1 for n in ranks], [1 / n for n in ranks]))


def test_held_out_loss_sample_and_best_are_the_same_on_any_number_of_ranks(pool, folder, tmp_path):  # noqa: F811
    measured = {"sample_queries": 4, "sample_documents": 11, "best_by": "validation_loss", "keep_best": True}
    lines = {}
    for ranks in (1, 2):
        config = evaluating(folder, tmp_path / str(ranks), steps=7, dropout=False, **measured)
        pool.run(train_body, ranks, config)
        lines[ranks] = [line for line in read_metrics(config.train.output_dir) if "validation_loss" in line]
    for one, two in zip(lines[1], lines[2], strict=True):
        assert one == pytest.approx(two, abs=1e-4)
    assert [line["step"] for line in lines[1]] == [0, 2, 4, 6, 7]
    losses = [line["validation_loss"] for line in lines[1]]
    best = lines[1][losses.index(min(losses))]
    assert lines[1][-1]["best_validation_loss"] == best["validation_loss"]
    assert lines[1][-1]["best_step"] == best["step"]
    run = tmp_path / "1"
    assert by_hand(run / "best", config) == pytest.approx(
        [best[f"validation_{name}"] for name in ("loss", "accuracy", "mrr")], abs=1e-5
    )
    # The whole is measured at the end alone, beside the sample.
    assert all(("eval_nDCG@10" in line) == (line["step"] == 7) for line in lines[1])
    data = load_retrieval(folder / "beir", "dev")
    part = sample(data, 4, 11)
    assert (len(part.queries), len(part.documents)) == (4, 11)
    assert {doc for grades in part.qrels.values() for doc in grades} <= set(part.doc_ids)
    assert part.query_ids == sample(replace(data, query_ids=data.query_ids[::-1]), 4, 11).query_ids[::-1]
    model = BiEncoderModel.from_pretrained(run / "model")
    for name, some in (("sample", part), ("eval", data)):
        figures = evaluate(model, some, RetrieveOptions(), measures=config.eval.measures)
        assert {f"{name}_{key}": value for key, value in figures.items()}.items() <= lines[1][-1].items()


def test_a_run_without_patience_left_ends_once(folder, tmp_path, capsys):  # noqa: F811
    """Nothing gets better: the start is the best. Killed before its end was noted, it ends after the same step."""
    config = evaluating(folder, tmp_path, steps=40, lr=1e-30, patience=3, keep_best=True, best_by="nDCG@10")
    train(config)
    metrics, model = (tmp_path / "metrics.jsonl").read_bytes(), (tmp_path / "model" / "model.safetensors").read_bytes()
    assert read_metrics(tmp_path)[-1]["step"] == 6
    assert "stopped after 6 of 40 steps: 3 evaluations were no better by eval_nDCG@10 than after step 0" in (
        capsys.readouterr().err
    )
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path / "checkpoints")] == [0]
    start = BiEncoderModel.from_pretrained(config.model.name_or_path).state_dict()
    assert_close(BiEncoderModel.from_pretrained(tmp_path / "best").state_dict(), start, atol=0)
    train(config)
    assert "this run is done" in capsys.readouterr().err
    (tmp_path / "done.json").unlink()
    train(config)
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == model
    assert json.loads((tmp_path / "done.json").read_text())["steps"] == 6
    # Another patience goes on from what was kept.
    train(replace(config, train=replace(config.train, max_steps=9), eval=replace(config.eval, patience=9)))
    assert json.loads((tmp_path / "done.json").read_text()) == {"steps": 9}


def test_the_best_checkpoint_outlives_newer_ones_and_is_written_once(folder, tmp_path, monkeypatch):  # noqa: F811
    written, save = [], checkpoint.save
    monkeypatch.setattr(
        checkpoint, "save", lambda folder, step, **given: written.append(step) or save(folder, step, **given)
    )
    config = evaluating(folder, tmp_path, steps=8, lr=1e-30, keep_best=True, at_start=False, best_by="validation_loss")
    train(replace(config, checkpoint=replace(config.checkpoint, every_steps=1, keep_last=2)))
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path / "checkpoints")] == [2, 7, 8]
    assert written == [*range(1, 9)]


def test_a_best_step_of_which_no_checkpoint_was_kept_is_said(folder, tmp_path, capsys):  # noqa: F811
    """The best evaluation was before `keep_best` was set: the run ends all the same."""
    config = evaluating(folder, tmp_path, steps=2, lr=1e-30, best_by="validation_loss")
    config = replace(config, checkpoint=replace(config.checkpoint, every_steps=2))
    train(config)
    longer = replace(config.train, max_steps=4)
    train(replace(config, train=longer, eval=replace(config.eval, keep_best=True)))
    assert "after step 0 was the best, and best/ is not written: " in capsys.readouterr().err
    assert json.loads((tmp_path / "done.json").read_text())["steps"] == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patience": 2}, "eval.patience needs eval.every_steps, and eval.data or eval.validation"),
        ({"data": "d", "best_by": "validation_loss"}, r"eval.best_by is 'validation_loss', which is not measured"),
        ({"sample_queries": 9}, "eval.sample_queries is set, but there is no eval.data"),
        ({"validation": {"path": "p", "weight": 2.0}}, "eval.validation has weight, which means nothing"),
    ],
)
def test_what_cannot_be_measured_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        EvalConfig(**values)


def test_a_similarity_that_nothing_is_searched_by_is_refused_before_the_first_step(folder, tmp_path):  # noqa: F811
    config = evaluating(folder, tmp_path / "run", steps=2)
    model = BiEncoderModel.from_pretrained(folder / "model")
    model.similarity = "euclidean"
    model.save_pretrained(tmp_path / "euclidean")
    config = replace(config, model=replace(config.model, name_or_path=str(tmp_path / "euclidean")))
    with pytest.raises(ValueError, match="saved with similarity 'euclidean'; expected one of cosine, dot: say which"):
        train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_warm_up_in_steps_and_a_least_rate():
    config = OptimConfig(lr=1.0, warmup_steps=2, min_lr=0.2)
    rates = [learning_rate(step, 10, config) for step in range(10)]
    assert rates == pytest.approx([0.5, 1.0, *(0.2 + 0.8 * left / 8 for left in range(8, 0, -1))])
    assert learning_rate(10, 10, replace(config, schedule="cosine")) == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"optim.min_lr is 2\.0: expected at most"):
        OptimConfig(lr=1.0, min_lr=2.0)


def test_a_logger_that_is_not_installed_is_said_at_the_start(folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("inbatch.train.boards.find_spec", lambda name: None if name == "wandb" else name)
    with pytest.raises(ValueError, match=r"train\.loggers names wandb, which is not installed: pip install wandb"):
        train(make_config(folder, tmp_path, train={"loggers": ["tensorboard", "wandb"]}))
    assert not (tmp_path / "config.yaml").exists()


def test_loggers_get_the_figures_and_a_resumed_run_goes_on_there(folder, tmp_path, monkeypatch):  # noqa: F811
    mlflow, _ = pytest.importorskip("mlflow"), pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for steps in (2, 4):
        config = make_config(
            folder, tmp_path / "run", train={"max_steps": steps, "loggers": ["wandb", "mlflow"]},
            eval=vars(EvalConfig(data=str(folder / "beir"))), checkpoint={"every_steps": 2},
        )  # fmt: skip
        train(config)
    lines = read_metrics(tmp_path / "run")
    known = json.loads((tmp_path / "run" / "loggers.json").read_text())
    history = mlflow.MlflowClient().get_metric_history(known["mlflow"], "train/loss")
    assert [(point.step, point.value) for point in history] == [(i["step"], i["loss"]) for i in lines if "loss" in i]
    assert mlflow.get_run(known["mlflow"]).data.metrics["eval/eval_nDCG_at_10"] == lines[-1]["eval_nDCG@10"]
    written = list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{known['wandb']}"))
    assert len(written) == 2
    assert not (tmp_path / "run" / "tensorboard").exists()
