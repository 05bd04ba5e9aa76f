"""Training beside a teacher: the same run on any number of ranks, its loss by hand, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch

from inbatch.data import BatchPlan, open_examples
from inbatch.encoder.model import BiEncoderModel
from inbatch.retrieval.mine import MineOptions, MiningSet, mine
from inbatch.train.check import check
from inbatch.train.run_folder import read_metrics
from tests.tiny_models import save_tiny
from tests.train.test_loop import assert_close, folder, make_config, train_body, trained  # noqa: F401


class Teacher:
    """A cross-encoder's interface: words in common."""

    def predict(self, texts, show_progress_bar=True):
        return [len(set(query.split()) & set(passage.split())) for query, passage in texts]


def test_mined_scores_are_distilled_alike_on_any_number_of_ranks(pool, folder, tmp_path):  # noqa: F811
    model = BiEncoderModel.from_pretrained(folder / "model")
    records = list(open_examples(folder / "records.jsonl"))
    texts = list(dict.fromkeys(passage.text for record in records for passage in record.positives))
    data = MiningSet(
        queries=[record.query for record in records],
        documents=texts,
        positives=[[texts.index(record.positives[0].text)] for record in records],
        same=[[]] * len(records),
    )
    mine(model, data, tmp_path / "mined.jsonl", MineOptions(num_negatives=2), teacher=Teacher())
    distill = {"weight": 2.0, "contrastive_weight": 0.5, "student_temperature": 0.3, "teacher_temperature": 2.0}
    source = {"train": [{"path": str(tmp_path / "mined.jsonl"), "loss_weight": 0.5}, str(folder / "records.jsonl")]}
    config = make_config(folder, tmp_path / "one", data={**source, "mixed_batches": True}, distill=distill)
    with pytest.warns(UserWarning, match=r"no scores of a teacher to distill in \S*records.jsonl"):
        train_body(0, config)
    two = replace(config, train=replace(config.train, output_dir=str(tmp_path / "two")))
    pool.run(train_body, 2, two)
    assert_close(trained(config), trained(two), atol=2e-6)
    for ours, theirs in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
        assert ours["loss"] == pytest.approx(0.5 * ours["contrastive_loss"] + 2 * ours["distill_loss"])
        assert ours["distill_loss"] > 0

    # The first step's, from the records' own lines.
    config = make_config(folder, tmp_path / "hand", data={"train": str(tmp_path / "mined.jsonl")}, distill=distill)
    config = replace(config, train=replace(config.train, max_steps=1))
    figures = train_body(0, config)
    lines = [json.loads(line) for line in (tmp_path / "mined.jsonl").read_text().splitlines()]
    losses = []
    for place in BatchPlan(len(lines), 8, config.train.seed).batch(0):
        line = lines[int(place)]
        texts = [[line["query"]], [line["pos"][0], *line["neg"]]]
        (query,), passages = (model(model.tokenize(some, max_length=n)) for some, n in zip(texts, (8, 12), strict=True))
        theirs = torch.tensor([line["pos_scores"][0], *line["neg_scores"]])
        a, b = (theirs / 2).softmax(0), (passages @ query / 0.3).softmax(0)
        losses.append(sum(a * (a / b).log()).item())
    assert figures["distill_loss"] == pytest.approx(sum(losses) / 8, rel=1e-4)


def test_records_without_scores_are_refused(folder, tmp_path):  # noqa: F811
    config = make_config(folder, tmp_path / "run", distill={"weight": 1.0})
    for refusing in (check, lambda config: train_body(0, config)):
        with pytest.raises(
            ValueError, match=r"no record has a teacher's scores: \S*records.jsonl \(26 of 26 records looked"
        ):
            refusing(config)
    with pytest.raises(ValueError, match=r"distill\.weight is 0, so that nothing is distilled"):
        make_config(folder, tmp_path / "run", distill={"student_temperature": 0.1})


@pytest.mark.parametrize("kind", ["pool", "cosine", "mse"])
def test_a_teacher_s_vectors_are_learnt_alike_on_any_number_of_ranks(pool, folder, tmp_path, kind):  # noqa: F811
    model = folder / ("dropout" if kind == "pool" else "model")  # in evaluation mode it is the same each time
    distill = {"weight": 2.0, "kind": kind, "teacher": str(model), "student_temperature": 0.3}
    source = [{"path": str(folder / "records.jsonl"), "loss_weight": 0.5}]
    config = make_config(folder, tmp_path / "one", distill=distill, data={"train": source}, train={"max_steps": 3})
    train_body(0, config)
    two = replace(config, train=replace(config.train, output_dir=str(tmp_path / "two")))
    pool.run(train_body, 2, two)
    assert_close(trained(config), trained(two), atol=2e-6)
    for ours, theirs in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    first, *_, last = (line["distill_loss"] for line in read_metrics(tmp_path / "one"))
    if kind == "pool":
        assert last < first
    else:  # it is its own teacher, and has nothing to learn in the first step
        assert first == pytest.approx(0, abs=1e-6)
        assert last > 1e-6


def test_a_teacher_that_does_not_fit_is_refused(folder, tmp_path):  # noqa: F811
    for values, message in (
        ({"kind": "pool"}, "kind is pool and distill.teacher None"),
        ({"teacher": "x"}, "is group"),
    ):
        with pytest.raises(ValueError, match=message):
            make_config(folder, tmp_path / "run", distill={"weight": 1.0, **values})
    save_tiny("bert", tmp_path / "wide", hidden_size=48, num_attention_heads=4)
    distill = {"weight": 1.0, "kind": "mse", "teacher": str(tmp_path / "wide")}
    with pytest.raises(ValueError, match=r"teacher's vectors have 48 dimensions, the model's 32: set it to pool"):
        train_body(0, make_config(folder, tmp_path / "run", distill=distill))


def test_a_student_of_several_vectors_learns_scores_alike_on_any_number_of_ranks(pool, folder, tmp_path):  # noqa: F811
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {"pos_scores": [len(text) for text in line["pos"]], "neg_scores": [len(text) for text in line["neg"]]}
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = []
    for world_size in (1, 2):
        config = make_config(
            folder,
            tmp_path / str(world_size),
            model={"pooling": "multi_vector"},
            multi_vector={"dim": 12},
            data={"train": str(tmp_path / "scored.jsonl")},
            loss={"temperature": 0.5},
            distill={"weight": 1.0, "teacher_temperature": 9.0},
            train={"max_steps": 2},
        )
        pool.run(train_body, world_size, config)
        found.append(read_metrics(tmp_path / str(world_size)))
    for ours, theirs in zip(*found, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
        assert ours["distill_loss"] > 0
