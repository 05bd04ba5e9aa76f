"""Groups of similar examples, and the batches made of them."""

import json
import random

import numpy as np
import pytest

from inbatch.cli import run
from inbatch.data import BatchPlan, open_examples
from inbatch.data.plan import Groups
from inbatch.retrieval.evaluate import RetrieveOptions
from inbatch.retrieval.grouping import GroupOptions, group_examples, load_groups
from inbatch.train.config import Config, DataConfig, ModelConfig, TrainConfig
from inbatch.train.setup import open_training_data, plan_mixture
from tests.data_files import write_jsonl
from tests.helpers import device
from tests.retrieval.test_evaluate import LetterEncoder
from tests.tiny_models import save_tiny

TOPICS = ["abcd", "efgh", "ijkl", "mnop", "qrst"]


def write_topics(path, count: int = 60):
    """Texts of the letters of one topic each, in turn."""
    chance = random.Random(0)

    def text(topic: int) -> str:
        return "".join(chance.choices(TOPICS[topic], k=12))

    return write_jsonl(path, [{"query": text(i % 5), "pos": [text(i % 5)]} for i in range(count)])


def _grouped(rank, path):
    options = GroupOptions(size=6, range_min=0, range_max=8)
    return group_examples(LetterEncoder().to(device()), open_examples(path), options, RetrieveOptions()).of


def test_groups_hold_what_is_alike_on_any_number_of_ranks(pool, tmp_path):
    path = write_topics(tmp_path / "topics.jsonl")
    (one,), (three, *others) = pool.run(_grouped, 1, path), pool.run(_grouped, 3, path)
    assert one.tolist() == three.tolist() == others[0].tolist()
    members = [np.flatnonzero(one == group) for group in range(one.max() + 1)]
    assert sum(map(len, members)) == 60
    assert max(map(len, members)) == 6
    assert np.mean([len({*(some % 5)}) == 1 for some in members if len(some) > 1]) > 0.9, "of one topic each"
    assert len(members) < 20


def test_known_documents_make_no_neighbours(tmp_path):
    """Copies of a query's positive, and the positives of an equal query, are no negatives to gather."""
    records = [{"query": "aab", "pos": ["abc"]}, {"query": "aab", "pos": ["aac"]}, {"query": "zz", "pos": ["abc"]}]
    records += [{"query": letter * 3, "pos": [letter * 4]} for letter in "xyw"]
    path = write_jsonl(tmp_path / "few.jsonl", records)
    groups = group_examples(LetterEncoder(), open_examples(path), GroupOptions(size=2, range_min=0, range_max=1))
    assert groups.of[0] not in (groups.of[1], groups.of[2])


def test_ranks_beyond_the_documents_are_refused(tmp_path):
    path = write_topics(tmp_path / "few.jsonl", 5)
    with pytest.raises(ValueError, match="range_min is 5, and there are 5 examples: lower it"):
        group_examples(LetterEncoder(), open_examples(path))


def test_batches_are_made_of_whole_groups(tmp_path):
    groups = Groups(np.arange(48, dtype=np.int32) % 12)
    plan = BatchPlan(48, 16, seed=3, groups=groups)
    epochs = [[sorted({*(plan.batch(step) % 12)}) for step in range(first, first + 3)] for first in (0, 3)]
    assert all(len(batch) == 4 for epoch in epochs for batch in epoch)
    assert epochs[0] != epochs[1]
    assert sorted(np.concatenate([plan.batch(step) for step in range(3)])) == [*range(48)]


def test_the_command_and_the_setting(tmp_path, capsys):
    path, save = write_topics(tmp_path / "topics.jsonl", 20), tmp_path / "groups.npz"
    save_tiny("bert", tmp_path / "model")
    command = ["group", str(tmp_path / "model"), str(path), str(save), "--size", "4", "--range-min", "0"]
    assert run([*command, "--no-progress", "--device", "cpu"]) == 0
    assert "20 examples in" in capsys.readouterr().out
    config = Config(
        model=ModelConfig(name_or_path="m"),
        data=DataConfig(train=[{"path": str(path), "groups": str(save)}], no_duplicates=True),
        train=TrainConfig(output_dir="o", global_batch_size=4),
    )
    examples = open_training_data(config)
    plan, groups = plan_mixture(config, examples), load_groups(save, examples)
    assert sorted(np.concatenate([plan.batch(step) for step in range(5)])) == [*range(20)]
    assert len({*groups.of[plan.batch(0)]}) < 4
    path.write_text(json.dumps({"query": "other", "pos": ["text"]}) + "\n")
    with pytest.raises(ValueError, match=r"groups .*groups\.npz are of other examples than these 1: make them anew"):
        plan_mixture(config, open_training_data(config))
    (tmp_path / "empty.npz").touch()
    (tmp_path / "cut.npz").write_bytes(save.read_bytes()[:100])
    np.save(tmp_path / "array.npy", np.zeros(3))
    for name in ("no.npz", "empty.npz", "cut.npz", "array.npy"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            load_groups(tmp_path / name, examples)
    command[3] = str(path)
    assert run(command) == 1
    assert "is read as the source, and would be replaced" in capsys.readouterr().err
    with pytest.raises(ValueError, match="groups need data"):
        DataConfig(train=[{"path": "p", "groups": "g"}], shuffle=False)
