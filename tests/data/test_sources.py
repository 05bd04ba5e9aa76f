"""Readers: each format written by the test itself, and the real sets where present."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inbatch.data import BatchPlan, Collator, Example, Passage, load_retrieval, open_examples
from inbatch.data.lines import Lines
from tests.data_files import one_line, texts, tokenize, write_beir, write_corpus_id, write_jsonl
from tests.helpers import REPOSITORY, data_dir

COLLATE = Collator(tokenize, query_max_len=30, passage_max_len=40)

# ------------------------------------------------------------------------------------------------------- inline formats

CONVENTIONS = {
    "sentence-transformers": (
        {"anchor": "q", "positive": "p", "negative_10": "n10", "negative_2": "n2", "negative_1": "n1"},
        ["n1", "n2", "n10"],
    ),
    "sentence-transformers, one negative": ({"anchor": "q", "positive": "p", "negative": "n"}, ["n"]),
    "FlagEmbedding": (
        {"query": "q", "pos": ["p"], "neg": ["n1", "n2"], "prompt": "ignored", "pos_scores": [1.0]},
        ["n1", "n2"],
    ),
    "NeMo, strings": ({"question": "q", "pos_doc": "p", "neg_doc": "n"}, ["n"]),
    "NeMo, lists": ({"query": "q", "pos_doc": ["p"], "neg_doc": ["n1", "n2"]}, ["n1", "n2"]),
    "NeMo, objects": ({"query": "q", "pos_doc": {"text": "p"}, "neg_doc": [{"text": "n", "id": 3}]}, ["n"]),
    "Tevatron": (
        {
            "query_id": "7",
            "query": "q",
            "positive_passages": [{"docid": "1", "title": "", "text": "p"}],
            "negative_passages": [{"docid": "2", "title": "head", "text": "body"}],
        },
        ["head body"],
    ),
}


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "json", "parquet"])
def test_inline_conventions(tmp_path, name, suffix):
    record, negatives = CONVENTIONS[name]
    path = tmp_path / f"train.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([record] * 3), path)
    elif suffix == "json":
        path.write_text(json.dumps([record] * 3))
    else:
        write_jsonl(path, [record] * 3)
    examples = open_examples(path)
    assert len(examples) == 3
    for example in (examples[0], examples[-1], *examples[1:2]):
        assert (example.query, texts(example.positives), texts(example.negatives)) == ("q", ["p"], negatives)
        assert example.query_id == ("7" if name == "Tevatron" else None)
        assert example.corpus == str(path)
    if name == "Tevatron":
        assert examples[0].negatives == (Passage("body", "head", "2"),)


def test_json_with_one_record_a_line(tmp_path):
    path = write_jsonl(tmp_path / "train.json", [{"query": "q", "pos": ["p"]}] * 2)
    assert len(open_examples(path)) == 2


def test_named_columns(tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"id": 5, "q": "why", "query": "other", "a": "yes", "bad": ["no", "nay"]}]
    )
    columns = {"query": "q", "positive": "a", "negative": "bad", "query_id": "id"}
    assert open_examples(path, columns=columns)[0] == Example(
        query="why",
        query_id="5",
        positives=(Passage("yes"),),
        negatives=(Passage("no"), Passage("nay")),
        corpus=str(path),
    )
    several = open_examples(path, columns={"query": "q", "positive": "bad", "negative": ["a", "query"]})
    assert texts(several[0].negatives) == ["yes", "other"]


def test_ragged_records_and_blank_lines(tmp_path):
    records = [{"query": "a", "pos": ["p"]}, "", {"query": "b", "pos": ["x", "y"], "neg": ["n", None, " "]}, "   \r"]
    examples = open_examples(write_jsonl(tmp_path / "a.jsonl", records))
    assert [(texts(e.positives), texts(e.negatives)) for e in examples] == [(["p"], []), (["x", "y"], ["n"])]


def test_parquet_with_nulls_and_other_columns(tmp_path):
    rows = [
        {"anchor": "a", "positive": "p", "negative_1": None, "negative_2": "n", "image": b"\x00\xff"},
        {"anchor": "b", "positive": "p", "negative_1": "m", "negative_2": None, "image": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [texts(e.negatives) for e in open_examples(tmp_path / "a.parquet")] == [["n"], ["m"]]


def test_last_line_without_newline_and_unicode(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        "\ufeff".encode() + '{"query": "é", "pos": "😀"}\n{"query": "\\ud83d\\ude00", "pos": "z"}'.encode()
    )
    examples = open_examples(path)
    assert [(e.query, e.positives[0].text) for e in examples] == [("é", "😀"), ("😀", "z")]


def test_several_sources_are_one_sequence(tmp_path):
    first = write_jsonl(tmp_path / "a.jsonl", [{"query": f"a{i}", "pos": "p"} for i in range(3)])
    second = write_jsonl(tmp_path / "b.jsonl", [{"anchor": f"b{i}", "positive": "p"} for i in range(2)])
    examples = open_examples([first, second, write_beir(tmp_path / "beir")])
    assert [e.query for e in examples] == ["a0", "a1", "a2", "b0", "b1", "query 0", "query 1"]
    assert examples[-1].query == "query 1"
    with pytest.raises(IndexError):
        examples[7]


def test_only_places_are_held_in_memory(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"query": f"q{i}", "pos": "p" * 500} for i in range(4000)])
    examples, lines = open_examples(path), Lines(path)
    assert lines.stops.nbytes == 4 * 4000
    assert [examples[i].query for i in (3999, 0, 1234)] == ["q3999", "q0", "q1234"]


def test_offsets_across_scan_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("inbatch.data.lines._BLOCK_BYTES", 7)
    monkeypatch.setattr("inbatch.data.lines._SCAN_BYTES", 7)
    values = [list(range(i % 5)) for i in range(50)]
    assert list(Lines(write_jsonl(tmp_path / "a.jsonl", values))) == values


def test_a_negative_that_equals_a_positive_is_left_out(tmp_path):
    records = [{"query": "a", "pos": "The  fact", "neg": ["The fact", "other"]}] + [{"query": "b", "pos": "p"}] * 3
    path = write_jsonl(tmp_path / "a.jsonl", records)
    with pytest.warns(UserWarning, match=r"a\.jsonl: 1 of 4 records \(25\.0%\)"):
        examples = open_examples(path)
    assert texts(examples[0].negatives) == ["other"]


# ------------------------------------------------------------------------------------------------------- corpus-id JSON


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_corpus_id_json(tmp_path, kind):
    example = open_examples(write_corpus_id(tmp_path, kind=kind))[0]
    assert example == Example(
        query="why?",
        query_id="7",
        positives=(Passage("doc 1", "", "1"), Passage("doc 2", "", "2")),
        negatives=(Passage("doc 3", "", "3"), Passage("doc 4", "", "4")),
        corpus="wiki",
    )


def test_corpus_id_files_share_a_corpus_but_not_a_name(tmp_path):
    path = write_corpus_id(tmp_path / "one")
    again = path.with_name("again.json")
    again.write_text(path.read_text())
    assert len(open_examples([path, again])) == 2
    with pytest.raises(ValueError, match="corpus_id 'wiki' names two corpora") as error:
        open_examples([path, write_corpus_id(tmp_path / "two")])
    one_line(error)


# --------------------------------------------------------------------------------------------------------- BEIR folders


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("header", [True, False])
def test_beir_folder(tmp_path, gz, header):
    folder = write_beir(tmp_path / "set", gz=gz, header=header)
    examples = open_examples(folder)
    assert len(examples) == 2
    assert examples[1] == Example(
        query="query 1",
        query_id="q1",
        positives=(Passage("text 1", "T1", "d1"), Passage("text 3", "T3", "d3")),
        negatives=(Passage("text 2", "", "d2"),),  # judged, and not relevant
        corpus=str(folder),
    )
    data = load_retrieval(folder, "train")
    assert data.query_ids == ["q0", "q1"]
    assert data.queries == ["query 0", "query 1"]
    assert data.doc_ids == [f"d{i}" for i in range(6)]
    assert list(data.documents) == ["text 0", "T1 text 1", "text 2", "T3 text 3", "text 4", "T5 text 5"]
    assert data.documents[2:4] == ["text 2", "T3 text 3"]
    assert data.qrels == {"q0": {"d0": 1}, "q1": {"d1": 1, "d2": 0, "d3": 2}}


def test_a_query_judged_only_irrelevant_is_no_example(tmp_path):
    folder = write_beir(tmp_path / "set", qrels={"train": [("q0", "d0", 0), ("q1", "d1", 1)]})
    assert [e.query_id for e in open_examples(folder)] == ["q1"]


def test_equal_texts_of_a_corpus_are_one_document_in_training_only(tmp_path):
    corpus = [{"_id": f"d{i}", "text": text} for i, text in enumerate(["same", "other", " same "])]
    folder = write_beir(tmp_path / "set", corpus=corpus, qrels={"train": [("q0", "d2", 1), ("q1", "d0", 1)]})
    first, second = COLLATE(list(open_examples(folder)), 0).passage_ids.tolist()
    assert first == second
    assert load_retrieval(folder, "train").doc_ids == ["d0", "d1", "d2"]


# ------------------------------------------------------------------------------------------------------------ real sets

REAL = {  # documents; queries of train, dev, test
    "medquad": (15_809, 11_529, 965, 1_851),
    "fairytaleqa": (4_094, 8_548, 1_025, 1_007),
    "scifact": (5_183, 809, None, 300),
    "pystdlib": (2_492, 1_768, 203, 426),
}


def check_real(folder: Path, name: str) -> None:
    documents, *queries = REAL[name]
    for split, count in zip(("train", "dev", "test"), queries, strict=True):
        if count is None:
            with pytest.raises(ValueError, match=re.escape(f"no qrels split {split!r}: it has ['test', 'train']")):
                load_retrieval(folder, split)
            continue
        data = load_retrieval(folder, split)
        assert (len(data.documents), len(data.queries), len(data.qrels)) == (documents, count, count)
        assert len(set(data.doc_ids)) == documents
        if split != "test":
            continue
        examples = open_examples(folder, split=split)
        assert [example.query for example in examples] == data.queries
        assert all(
            {p.doc_id for p in example.positives} == set(data.qrels[query_id])
            for example, query_id in zip(examples, data.query_ids, strict=True)
        )
    examples = open_examples(folder)
    assert len(examples) == queries[0]
    rows = BatchPlan(len(examples), 256, seed=0).batch(1)[:128]
    collate = Collator(tokenize, query_max_len=30, passage_max_len=40)
    batch = collate([examples[row] for row in rows], 0)
    assert len(batch.query_ids) == len(batch.passage_ids) == 128
    chosen = batch.positive_ids == batch.passage_ids[batch.positives][:, None]
    assert chosen.any(1).all()


@pytest.mark.parametrize("name", ["medquad", "fairytaleqa", "scifact"])
def test_real_set(name):
    check_real(data_dir(name), name)


def test_shipped_set():
    folder = REPOSITORY / "examples" / "pystdlib"
    check_real(folder, "pystdlib")
    assert "PSF" in (folder / "LICENSE.txt").read_text()
