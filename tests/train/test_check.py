"""Everything in the list of misuse is found where it was made; real sets are described, and their page is whole."""

import base64
import html.parser
import random
import types
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import yaml

from inbatch.cli import run
from inbatch.train import check
from inbatch.train.check import LEVELS
from inbatch.train.config_file import load
from inbatch.train.loop import train
from inbatch.train.run_folder import read_metrics
from tests.data_files import write_beir, write_jsonl
from tests.helpers import data_dir
from tests.tiny_models import WORDS, minilm, save_tiny


class Page(html.parser.HTMLParser):
    """Tags that are open, the images within the page, and whatever it would load."""

    def __init__(self):
        super().__init__()
        self.open, self.images, self.loaded = [], [], []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        within = values.get("src", "").partition("data:image/svg+xml;base64,")[2]
        self.images += [base64.b64decode(within)] if within else []
        self.loaded += [name for name in ("src", "href") if name in values and not within]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def config_of(tmp_path: Path, **groups) -> Path:
    usual = {
        "model": {"name_or_path": str(tmp_path / "model")},
        "train": {"output_dir": str(tmp_path / "run"), "global_batch_size": 32},
    }
    usual["data"] = {"query_max_len": 12, "passage_max_len": 24}
    tree = {key: {**usual.get(key, {}), **groups.get(key, {})} for key in (*usual, *groups)}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def text(chance: random.Random, words: int) -> str:
    return " ".join(chance.choices(WORDS, k=words))


def pairs_with_mistakes(tmp_path: Path) -> Path:
    """Prompts in the texts, queries that are their own positives, one positive for many, held-out queries."""
    chance = random.Random(0)
    records = [{"query": f"query: {text(chance, 7)}", "pos": ["the cat"], "score": 1} for _ in range(60)]
    records += [{"query": record["query"], "pos": [record["query"]], "score": 1} for record in records[:9]]
    source = write_jsonl(tmp_path / "pairs.jsonl", records)
    return config_of(
        tmp_path,
        model={"l2_normalize": False},
        data={"train": [{"path": str(source), "negatives": "all"}], "query_prefix": "query: "},
        loss={"mask_duplicates": False, "hardness_mode": "hard_negatives", "hardness_strength": 5.0},
        optim={"lr": 2.0},
        eval={"validation": str(source)},
    )


def negatives_with_mistakes(tmp_path: Path) -> Path:
    """Negatives that equal the positive, one pair again and again, texts far above their length, no batch at all."""
    chance = random.Random(1)
    long = [text(chance, 60) for _ in range(20)]
    records = [{"query": text(chance, 9), "pos": [passage], "neg": [long[0], passage]} for passage in long]
    source = write_jsonl(tmp_path / "mined.jsonl", [*records, *records[:1] * 9])
    alone = write_jsonl(tmp_path / "alone.jsonl", [{"query": text(chance, 5), "pos": [text(chance, 9)]}] * 8)
    return config_of(
        tmp_path,
        data={
            "train": [str(source), {"path": str(alone), "negatives": "own", "train_n_passages": 1}],
            "query_max_len": 10, "passage_max_len": 20, "train_n_passages": 8,
        },
        loss={"temperature": 1.0, "negatives": "local"},
        optim={"warmup_ratio": 0.9},
        train={"accumulation_steps": 4, "global_batch_size": 8, "micro_batch_tokens": 100_000},
    )  # fmt: skip


def judgements_with_mistakes(tmp_path: Path) -> Path:
    """Grades, a document that answers everything, and an evaluation with the training documents."""
    qrels = {"train": [(f"q{i}", "d0", 3) for i in range(3)], "dev": [("q3", "d0", 1)]}
    write_beir(tmp_path / "beir", qrels=qrels)
    return config_of(
        tmp_path,
        model={"name_or_path": str(save_tiny("bert", tmp_path / "tiny-e5"))},
        data={"train": str(tmp_path / "beir")},
        loss={"detach_remote": True, "mask_duplicates": "positive"},
        eval={"data": str(tmp_path / "beir"), "split": "dev"},
    )


EXPECTED = {
    pairs_with_mistakes: "unnormalised learning_rate memory duplicates same_text prompt_twice hardness leaked_queries "
    "similarity not_used gpus",
    negatives_with_mistakes: "temperature truncation no_candidates some_truncation negative_is_positive repeated "
    "too_few_negatives few_candidates accumulation local_negatives warm_up micro_batch",
    judgements_with_mistakes: "detached prompt_missing grades leaked_documents masked",
}


@pytest.mark.parametrize("make", EXPECTED)
def test_every_mistake_is_found(tmp_path, capsys, monkeypatch, make):
    save_tiny("bert", tmp_path / "model")
    path = make(tmp_path)
    ranks = 1 if make is pairs_with_mistakes else 2
    if ranks == 1:  # as if two small GPUs were here
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        small = types.SimpleNamespace(total_memory=1000)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: small)
    found = check.check(load(path), ranks=ranks)
    assert {*EXPECTED[make].split()} <= {finding.code for finding in found.findings}
    status = run(["check", str(path), "--nproc-per-node", str(ranks), "--html", str(tmp_path / "page.html")])
    out = capsys.readouterr().out.splitlines()
    assert status == 1
    assert [line.split()[1].rstrip(":") for line in out[1 : 1 + len(found.findings)]] == [
        f.code for f in found.findings
    ]
    page = Page()
    page.feed((tmp_path / "page.html").read_text())
    assert page.open == page.loaded == []
    assert len(page.images) == len(found.sources)
    assert all(ElementTree.fromstring(image).tag.endswith("svg") for image in page.images)


def test_the_list_of_mistakes_is_tested_as_a_whole():
    expected = {code for codes in EXPECTED.values() for code in codes.split()}
    assert expected | {"some_leaked_queries"} == {*LEVELS}  # fairytaleqa has those


@pytest.mark.parametrize("name", ["medquad", "fairytaleqa", "pystdlib"])
def test_real_sets_have_no_errors(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(check, "TEXTS", 100)
    monkeypatch.setattr(check, "ROWS", 2000)
    monkeypatch.setenv("INBATCH_CACHE", str(tmp_path))
    folder = str(data_dir(name))
    path = config_of(
        tmp_path,
        model={"name_or_path": str(minilm())},
        data={"train": folder, "passage_max_len": 256},
        train={"global_batch_size": 64},
        eval={"data": folder},
    )
    assert run(["check", str(path)]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert "error" not in first
    assert ("some_leaked_queries" in "".join(lines)) == (name == "fairytaleqa")
    assert any(line.startswith("each query sees 64 candidates") for line in lines)


def test_what_training_cuts_and_refuses_is_cut_and_found(tmp_path):
    save_tiny("bert", tmp_path / "model")
    chance = random.Random(2)
    records = [{"query": text(chance, 60), "pos": [text(chance, 60)], "neg": [text(chance, 60)]} for _ in range(32)]
    source = write_jsonl(tmp_path / "records.jsonl", records)
    alone = {"path": str(source), "negatives": "own", "train_n_passages": 1}
    checked = check.check(load(config_of(tmp_path, data={"train": [alone]})))
    assert checked.batches.first.tokens == 32 * (12 + 24), "texts are cut on both sides"
    (found,) = [finding for finding in checked.findings if finding.code == "no_candidates"]
    assert f"{source}: negatives is own, and train_n_passages is 1" in found.text
    one = {
        "model": {"name_or_path": str(tmp_path / "model"), "pooling": "multi_vector"},
        "data": {"train": str(source)},
    }
    alone = config_of(tmp_path, **one, train={"global_batch_size": 1})
    with pytest.warns(UserWarning, match="has no projection"):
        assert check.check(load(alone), ranks=3).batches.first.queries == [0, 0, 1]


def test_candidates_are_those_that_training_counts(tmp_path):
    """What the loss counts in the first step of an epoch is what the check expects of its batch."""
    save_tiny("bert", tmp_path / "model")
    chance = random.Random(3)
    some = [text(chance, 3) for _ in range(6)]
    queries = [text(chance, 2) for _ in range(5)]
    records = [
        {"query": chance.choice(queries), "pos": chance.sample(some, 2), "neg": [text(chance, 4)]} for _ in range(24)
    ]
    source = write_jsonl(tmp_path / "records.jsonl", records)
    for policy in ("all", "positives", "own"):
        path = config_of(
            tmp_path,
            data={"train": [{"path": str(source), "negatives": policy}], "num_workers": 0},
            train={"output_dir": str(tmp_path / policy), "global_batch_size": 24, "log_every": 1, "progress": False},
        )
        config = load(path)
        expected = check.check(config).batches
        train(replace(config, train=replace(config.train, max_steps=1, device="cpu")))
        (line,) = read_metrics(tmp_path / policy)
        assert line["candidates"] == pytest.approx(expected.candidates.mean())
    with pytest.raises(ValueError, match="9999"):  # as training would
        check.check(replace(config, loss=replace(config.loss, matryoshka_dims=[9999])))
