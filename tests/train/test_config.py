"""The configuration: one file, every field an option, mistakes refused in one line that names the remedy."""

import itertools
import re
import tracemalloc

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from inbatch.train.config import (
    MAY_CHANGE,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    differences,
    dump,
    flatten,
)
from inbatch.train.config_file import load
from inbatch.train.settings import GROUPS, keys
from inbatch.train.setup import open_training_data
from tests.data_files import write_jsonl

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


@pytest.mark.parametrize("text", ["# query: ", "'quoted'", "[INST] ", "yes", "1e5", "a: b", "*x", "!!x", "{", "null "])
def test_options_that_are_text_are_taken_as_typed(write, text):
    for option in (["--data.query_prefix", text], [f"--data.query_prefix={text}"]):
        assert load(write(), option).data.query_prefix == text
    assert load(write(data={"query_prefix": "q"}), ["--data.query_prefix=null"]).data.query_prefix is None


def test_columns_may_be_lists(write):
    columns = {"query": "question", "negative": ["worse", "worst"]}
    assert load(write(data={"columns": columns})).data.columns == columns
    option = ["--data.columns", "{query: question, negative: [worse, worst]}"]
    config = load(write(), option)
    assert config.data.columns == columns
    with pytest.raises(ValueError, match=r"data.columns is \{'query': \[1\]\}: expected \{name: text or \[text"):
        load(write(data={"columns": {"query": [1]}}))


def test_sources_may_have_settings(write):
    source = {"path": "a.jsonl", "num_samples": 5, "columns": {"negative": ["n", "m"]}, "corpus": "c"}
    assert load(write(data={"train": source})).data.train == source
    assert load(write(data={"train": ["b", source]})).data.train == ["b", source]
    config = load(write(), ["--data.train={path: a, num_samples: 5}", "--data.corpus=c"])
    assert (config.data.train, config.data.corpus) == ({"path": "a", "num_samples": 5}, "c")
    for wrong, message in (
        ({"path": "a", "numsamples": 5}, ": unknown key 'numsamples', expected path, weight, num_samples, split, "),
        ({"num_samples": 5}, ": path is missing"),
        ({"path": 3}, ": path is 3: expected text"),
        ({"path": "a", "num_samples": "5"}, ": num_samples is 5: expected a whole number"),
        ({"path": "a", "weight": float("inf")}, ": weight is inf: expected a finite number"),
        (3, " is 3: expected text or {path, weight, num_samples, split, columns, corpus, "),
    ):
        with pytest.raises(ValueError, match=rf"line 2: data.train{re.escape(message)}"):
            load(write(data={"train": wrong}))
        with pytest.raises(ValueError, match=re.escape(message.removeprefix(" is 3"))):
            load(write(data={"train": ["b", wrong]}))


def test_documents_by_id_are_trained_on_from_the_file_alone(write, tmp_path):
    write_jsonl(tmp_path / "elsewhere.jsonl", [{"docid": f"{n}", "text": f"document {n}"} for n in range(4)])
    record = {"query_id": "1", "query_text": "q", "positive_document_ids": ["2"], "negative_document_ids": ["3"]}
    write_jsonl(tmp_path / "a.jsonl", [record] * 5)
    (tmp_path / "b.csv").write_text("frage,gut\nx,y\n")
    corpus = str(tmp_path / "elsewhere.jsonl")
    by_id = {"path": str(tmp_path / "a.jsonl"), "num_samples": 2}
    for data in (
        {"train": [by_id, {"path": str(tmp_path / "b.csv"), "columns": {"query": "frage", "positive": "gut"}}]}
        | {"corpus": corpus},
        {"train": {**by_id, "corpus": corpus}},
    ):
        examples = open_training_data(load(write(data=data)))
        assert examples[0].positives[0].text == "document 2"
        assert [e.query for e in examples] == ["q", "q", "x"][: len(examples)]


def test_saved_and_read_back_is_equal(write, tmp_path):
    config = load(
        write(data={"columns": {"query": "question"}, "train": [{"path": "a", "columns": {"negative": ["n"]}}, "b"]}),
        ["--train.micro_batch_tokens", "null"],
    )
    (tmp_path / "resolved.yaml").write_text(dump(config))
    assert load(tmp_path / "resolved.yaml") == config
    assert set(flatten(config)) == set(keys())


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
        ("train", "micro_batch_tokens", -1, "train.micro_batch_tokens is -1: expected at least 1, or null"),
        ("train", "micro_batch_tokens", "all", "is all: expected a whole number or 'auto' or null"),
        ("train", "keep_graph_mib", -1, "train.keep_graph_mib is -1: expected at least 0"),
        ("train", "max_steps", 2.5, "train.max_steps is 2.5: expected a whole number or null"),
        ("train", "accumulation_steps", 3, "not divisible by train.accumulation_steps 3"),
        ("loss", "temperature", 0, "loss.temperature is 0: expected a positive number"),
        ("data", "query_max_len", 1, "data.query_max_len is 1: expected at least 3"),
        ("data", "train", [], "data.train is empty"),
        ("eval", "every_steps", 0, "eval.every_steps is 0: expected at least 1"),
        ("optim", "lr", None, "config.yaml line 6: optim.lr is null: expected a number"),
        ("optim", "lr", float("inf"), "optim.lr is inf: expected a finite number"),
        ("optim", "lr", float("nan"), "optim.lr is nan: expected a finite number"),
        ("optim", "lr", True, "optim.lr is true: expected a number"),
        ("optim", "betas", [0.9], "optim.betas is [0.9]: expected [a number, a number]"),
        ("optim", "betas", [0.9, 1.5], "optim.betas is [0.9, 1.5]: expected less than 1"),
        ("optim", 7, 1, "optim has the key 7, which is no name"),
        ("train", "seed", True, "train.seed is true: expected a whole number"),
        ("train", "seed", 2**64, "train.seed is 18446744073709551616: expected less than 9.22337e+18"),
        ("train", "timeout_minutes", 1e300, "train.timeout_minutes is 1e+300: expected less than 1e+06"),
        ("data", "source_weights", 1e-300, "data.source_weights is 1e-300: expected at least 0.1, or a name"),
        ("train", "progress", 1, "train.progress is 1: expected true or false"),
        ("loss", "temperature", 1e-40, "loss.temperature is 1e-40: expected at least 1e-6"),
        ("model", "name_or_path", 7, "model.name_or_path is 7: expected text"),
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


def test_several_mistakes_are_said_at_once(write):
    with pytest.raises(ValueError, match=r"loss.margin is big: expected a number or null; .*unknown key 'optim.x'"):
        load(write(optim={"x": 1}, loss={"margin": "big"}))
    with pytest.raises(ValueError, match=r"^unknown key 'optim.x'"):
        OptimConfig(x=1)  # type: ignore[call-arg]


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n" for before, name in itertools.pairwise("abcdefghij")
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB, r"line 2 .*\*a is an alias"),
        ("optim: " + "[" * 100_000, "line 1 .*nested more than 8 deep"),
        ("optim: " + "{a: " * 100_000, "line 1 .*nested more than 8 deep"),
        ("- " * 100_000, "line 1 .*nested more than 8 deep"),
        ("train:\n  progress: !!bool foo", "line 2 .*is a tag"),
        ("train: !!python/object:os.system {}", "line 1 .*is a tag"),
        ("train:\n  seed: " + "9" * 5000, "line 2 .*cannot be read"),
        ("data:\n  split: 2020-13-45", "line 2 .*cannot be read .*put text in quotes"),
        ("? [a]\n: b", "line 1 .*unhashable key"),
        ("a: b\n---\nc: d", "line 2 .*another document"),
        ("optim: \x00", "not YAML"),
        ("optim: {lr: 1", "not YAML"),
        ("#" * (2 << 20), "holds more than 1 MiB"),
        ("", "holds no configuration"),
        ("7: {}", "line 1: unknown group 7; expected one of model, lora"),
        ("<<: {optim: {lr: 1}}", "unknown group '<<'|missing"),
    ],
    ids=lambda value: value[:12],
)
def test_malformed_files_are_one_line_in_bounded_time_and_memory(tmp_path, content, message):
    (tmp_path / "bad.yaml").write_text(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as error:
            load(tmp_path / "bad.yaml")
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500 + len(str(tmp_path))


@settings(max_examples=300, deadline=None)
@given(content=st.one_of(st.binary(max_size=60), st.text("abc:{}[]-,&*!?|>'\"%@#\n 0.~", max_size=60).map(str.encode)))
def test_any_file_is_a_configuration_or_one_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - whatever is wrong, it is said in one line
        load(path)
    assert "\n" not in str(error.value)


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
    assert {*keys(), *GROUPS} >= MAY_CHANGE
