"""A multi-vector model trained, searched, encoded and mined with, on two processes as on one."""

import json
import warnings
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch

from inbatch import BiEncoderModel
from inbatch.cli import run as run_cli
from inbatch.data import load_retrieval
from inbatch.losses.max_sim import Tokens
from inbatch.retrieval import embed as embedding
from inbatch.retrieval import kept as keeping
from inbatch.retrieval.embed import EmbedOptions, embed
from inbatch.retrieval.encode_file import encode_to_file
from inbatch.retrieval.evaluate import RetrieveOptions, retrieve
from inbatch.retrieval.mine import MineOptions, mine, open_mining_set
from inbatch.train.config import Config
from inbatch.train.loop import train
from inbatch.train.run_folder import read_metrics
from tests.train.test_loop import make_config, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("multi"))


def settings(folder, output, **changes) -> Config:
    config = make_config(
        folder,
        output,
        model={"pooling": "multi_vector"},
        multi_vector={"dim": 12},
        data={"query_max_len": 10, "passage_max_len": 24, "token_cache": "off"},
        loss={"temperature": 0.5, "learnable_temperature": True},
        train={"global_batch_size": 9, "max_steps": 3, "micro_batch_tokens": 60, "loggers": []},
        eval={"data": str(folder / "beir"), "at_start": False},
    )
    return replace(config, **{group: replace(getattr(config, group), **new) for group, new in changes.items()})


def train_body(rank, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(config)


def test_any_way_of_training_is_that_of_one_process(pool, folder, tmp_path, capsys):
    """GradCache, ranks, packing, LoRA and FSDP2: losses and the evaluation's figures; the model opens as it was."""
    ways = {
        "whole": (1, {"train": {"micro_batch_tokens": None}}),
        "ddp": (2, {}),
        "packed fsdp2": (2, {"model": {"packed": True}, "train": {"parallel": "fsdp2"}}),
        "ring": (2, {"loss": {"negatives": "ring"}}),
    }
    found = {}
    for name, (world_size, changes) in ways.items():
        pool.run(train_body, world_size, settings(folder, tmp_path / name, **changes))
        lines = read_metrics(tmp_path / name)
        found[name] = [line["loss"] for line in lines if "loss" in line]
        found[name] += [value for line in lines for key, value in line.items() if key.startswith("eval_")]
    for name, figures in found.items():
        assert len(figures) == 6
        assert figures == pytest.approx(found["whole"], abs=2e-4), name
    model = BiEncoderModel.from_pretrained(tmp_path / "ddp" / "model")
    assert (model.multi_vector.dim, model.query_length, model.document_length) == (12, 10, 24)
    lora = settings(
        folder,
        tmp_path / "lora",
        lora={"r": 2},
        eval={"data": None},
        multi_vector={"attend_to_expansion": True},
        loss={"temperature": 0.1},
    )
    train_body(0, lora)
    assert "scores are sums of up to 10 cosines" in capsys.readouterr().err
    assert BiEncoderModel.from_pretrained(tmp_path / "lora" / "model").multi_vector.attend_to_expansion
    for wrong, message in (
        ({"loss": {"objective": "gte"}}, "loss.objective is gte"),
        ({"eval": {"similarity": "dot"}}, "eval.similarity is dot"),
        ({"lora": {"r": 2, "merge": False}}, "cannot hold new ones"),
    ):
        with pytest.raises(ValueError, match=message):
            train_body(0, settings(folder, tmp_path / "wrong", **wrong))


def search_body(rank, model_folder, beir, records, output):
    model = BiEncoderModel.from_pretrained(model_folder).eval()
    data = load_retrieval(beir, "dev")
    options = RetrieveOptions(top_k=5)
    run = retrieve(model, data, options)
    how = EmbedOptions(task="document")
    shape = encode_to_file(model, beir / "corpus.jsonl", output / "all.npy", how)
    encode_to_file(model, beir / "corpus.jsonl", output / "half.safetensors", replace(how, dtype=torch.float16))
    records, options = open_mining_set(records), MineOptions(num_negatives=2)
    mine(model, records, output / "mined.jsonl", options)
    with patch.object(embedding, "WINDOW", 4), patch.object(keeping, "WINDOW", 4):
        mine(model, records, output / "kept.jsonl", options, kept=output / "kept")
        if rank == 0:
            sorted((output / "kept").iterdir())[1].unlink()
        mine(model, records, output / "again.jsonl", options, kept=output / "kept")
    return run, shape


def test_one_process_needs_no_process_group(folder, tmp_path):
    train_body(0, settings(folder, tmp_path, train={"max_steps": 1}))
    assert "eval_nDCG@10" in read_metrics(tmp_path)[-1]


def test_search_encode_and_mine_by_max_sim(pool, folder, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = BiEncoderModel.from_pretrained(folder / "model", pooling="multi_vector", multi_vector={"dim": 12})
    model.save_pretrained(tmp_path / "model")
    model.eval()
    data = load_retrieval(folder / "beir", "dev")
    queries = embed(model, data.queries, EmbedOptions(task="query", prefix="[Q] "))
    documents = embed(model, data.documents, EmbedOptions(task="document", prefix="[D] "))
    assert isinstance(queries, Tokens)
    assert isinstance(documents, Tokens)
    texts = [side.vectors.split(side.lengths.tolist()) for side in (queries, documents)]
    scores_QN = torch.tensor([[float((q @ d.T).amax(1).sum()) for d in texts[1]] for q in texts[0]])
    results = pool.run(search_body, 2, tmp_path / "model", folder / "beir", folder / "records.jsonl", tmp_path / "out")
    run, shape = results[0]
    assert run == results[1][0]
    for query, row_N in zip(data.query_ids, scores_QN, strict=True):
        expected = {
            data.doc_ids[i]: float(row_N[i]) for i in row_N.argsort(descending=True) if data.doc_ids[i] != query
        }
        for document, score in run[query].items():
            assert score == pytest.approx(expected[document], abs=1e-4)
        assert min(run[query].values()) >= sorted(expected.values(), reverse=True)[4] - 1e-4
    vectors, offsets = np.load(tmp_path / "out" / "all.npy"), np.load(tmp_path / "out" / "all.npy.offsets.npy")
    prompted = embed(model, data.documents, EmbedOptions(task="document"))
    assert shape == vectors.shape
    torch.testing.assert_close(torch.from_numpy(vectors), prompted.vectors, atol=1e-5, rtol=1e-5)
    assert np.diff(offsets).tolist() == prompted.lengths.tolist()
    assert (tmp_path / "out" / "all.npy.ids.txt").read_text().split() == list(data.doc_ids)
    command = ["encode", str(tmp_path / "model"), str(folder / "beir" / "corpus.jsonl"), str(tmp_path / "few.npy")]
    assert run_cli([*command, "--pool-factor", "2", "--device", "cpu"]) == 0
    free = documents.lengths - 1
    expected = 1 + torch.where(free > 1, (free // 2).clamp(min=1), free)
    assert np.diff(np.load(tmp_path / "few.npy.offsets.npy")).tolist() == expected.tolist()
    mined = [json.loads(line) for line in (tmp_path / "out" / "mined.jsonl").read_text().splitlines()]
    for name in ("kept", "again"):
        lines = [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
        assert [line["neg"] for line in lines] == [line["neg"] for line in mined]
    assert all(record["neg_scores"] == sorted(record["neg_scores"], reverse=True) for record in mined)
    assert sum(map(len, (record["neg"] for record in mined))) > 0
    shard = next((tmp_path / "out" / "kept").iterdir())
    shard.write_bytes(shard.read_bytes()[:-5])
    again = BiEncoderModel.from_pretrained(tmp_path / "model")
    records, message = (
        open_mining_set(folder / "records.jsonl"),
        r"safetensors is damaged .*: remove it, and it is made",
    )
    with patch.object(keeping, "WINDOW", 4), pytest.raises(ValueError, match=message):
        mine(again, records, tmp_path / "a.jsonl", kept=tmp_path / "out" / "kept")
