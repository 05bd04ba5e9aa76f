"""The configuration: one file, every field an option, mistakes refused in one line that names the remedy."""

import re

import pytest
import yaml

from inbatch.train.config import Config, DataConfig, LossConfig, ModelConfig, TrainConfig, differences, dump, flatten
from inbatch.train.config_file import leaf_keys, load

REQUIRED = {
    "model": {"name_or_path": "a-model"},
    "data": {"train": "records.jsonl"},
    "train": {"output_dir": "runs/one"},
}


@pytest.fixture
def write(tmp_path):
    def write_(**groups) -> str:
        tree = {group: {**REQUIRED.get(group, {}), **groups.get(group, {})} for group in {**REQUIRED, **groups}}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tree))
        return str(path)

    return write_


def test_file_then_options(write):
    path = write(optim={"lr": "1e-4", "betas": [0.9, 0.95]}, loss={"temperature": 0.05})
    config = load(
        path, ["--optim.lr", "3e-5", "--train.max_steps=7", "--data.train", "[a, b]", "--model.pooling", "cls"]
    )
    assert config.optim.lr == 3e-5
    assert config.optim.betas == (0.9, 0.95)
    assert config.loss.temperature == 0.05
    assert config.train.max_steps == 7
    assert config.data.train == ["a", "b"]
    assert config.model.pooling == "cls"


def test_text_stays_text(write):
    config = load(
        write(data={"query_prefix": "query: "}), ["--data.passage_prefix", "passage: ", "--model.name_or_path", "7"]
    )
    assert (config.data.query_prefix, config.data.passage_prefix) == ("query: ", "passage: ")
    assert config.model.name_or_path == "7"


def test_saved_and_read_back_is_equal(write, tmp_path):
    config = load(write(data={"columns": {"query": "question"}}), ["--train.micro_batch_tokens", "null"])
    (tmp_path / "resolved.yaml").write_text(dump(config))
    assert load(tmp_path / "resolved.yaml") == config
    assert set(flatten(config)) == set(leaf_keys())


@pytest.mark.parametrize(
    ("group", "key", "value", "message"),
    [
        ("optim", "learning_rate", 1e-4, "unknown key 'optim.learning_rate'; did you mean 'optim.lr'?"),
        ("loss", "temprature", 0.1, "unknown key 'loss.temprature'; did you mean 'loss.temperature'?"),
        ("train", "lr", 1e-4, "unknown key 'train.lr'; did you mean 'optim.lr'?"),
        ("data", "train_group_size", 8, "unknown key 'data.train_group_size'; did you mean 'data.train_n_passages'?"),
        ("model", "qqqqqq", 8, "unknown key 'model.qqqqqq'; `inbatch train --help` lists every key"),
        ("optim", "lr", "fast", "optim.lr is fast: expected a number"),
        ("loss", "negatives", "far", "loss.negatives is far: expected 'gather' or 'ring' or 'local'"),
        ("train", "max_steps", 2.5, "train.max_steps is 2.5: expected a whole number or null"),
        ("train", "accumulation_steps", 3, "not divisible by train.accumulation_steps 3"),
        ("loss", "temperature", 0, "loss.temperature is 0.0: expected a positive number"),
        ("data", "query_max_len", 1, "data.query_max_len is 1: expected at least 3"),
        ("data", "train", [], "data.train is empty"),
        ("eval", "every_steps", 0, "eval.every_steps is 0: expected at least 1"),
    ],
)
def test_mistakes_in_the_file(write, group, key, value, message):
    path = write(**{group: {key: value}})
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--optim.learning_rte=1", "did you mean 'optim.lr'?"),
        ("--lr=1", "did you mean 'optim.lr'?"),
        ("--optim", "unknown key 'optim'"),
        ("--optim.lr=x", "optim.lr is x: expected a number"),
        ("stray", "unrecognized arguments: stray"),
    ],
)
def test_mistakes_on_the_command_line(write, option, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load(write(), [option])
    assert "\n" not in str(error.value)


def test_mistakes_in_the_file_itself(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load(tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("optim:\n  lr: [1\n")
    with pytest.raises(ValueError, match=r"bad\.yaml line 3 is not YAML"):
        load(bad)
    bad.write_text("data: {query_prefix: '\xe9'}\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"bad\.yaml is not UTF-8 .*byte 0xe9 in position 22"):
        load(bad)
    bad.write_text("optim:\n  lr: 1\n  eps: 1\n  'lr': 2\n")
    with pytest.raises(ValueError, match=r"bad\.yaml line 4 .*the key 'lr' stands in line 2 already"):
        load(bad)
    bad.write_text("optim: {lr: 1}\neval: {split: dev}\noptim: {eps: 1}\n")
    with pytest.raises(ValueError, match=r"bad\.yaml line 3 .*the key 'optim' stands in line 1 already"):
        load(bad)
    bad.write_text("optimizer:\n  lr: 1\n")
    with pytest.raises(ValueError, match="unknown group 'optimizer'; did you mean 'optim'"):
        load(bad)
    bad.write_text("optim: 3\n")
    with pytest.raises(ValueError, match="optim is 3, expected keys below it"):
        load(bad)
    bad.write_text("optim:\n")
    with pytest.raises(ValueError, match="optim is empty, expected keys below it, such as 'lr'"):
        load(bad)
    bad.write_text("optim: {lr: 1}\n")
    with pytest.raises(ValueError, match=r"missing.*model\.name_or_path, data\.train, train\.output_dir"):
        load(bad)


def test_which_changes_make_another_run():
    def config(**train) -> Config:
        return Config(
            model=ModelConfig(name_or_path="m"),
            data=DataConfig(train=["d"]),
            train=TrainConfig(output_dir="o", **train),
        )

    assert differences(config(), config(epochs=9, log_every=1, progress=False)) == {}
    assert differences(config(seed=1), config(seed=2)) == {"train.seed": (1, 2)}
    assert LossConfig().temperature == 0.02
