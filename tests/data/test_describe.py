"""What `inbatch data` shows of a source: its kind, columns, counts, lengths, first records, and what is not read."""

import json

import pytest

from inbatch.cli import run
from inbatch.data.describe import describe
from tests.data_files import write_beir, write_corpus_id, write_jsonl


def test_records(tmp_path):
    records = [
        {"question": f"what is {n}", "pos": ["one two three"], "worse": [f"bad {m}" for m in range(n)], "lang": "en"}
        for n in range(4)
    ]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    shown = describe(str(path), columns={"negative": "worse"}, first=2).splitlines()
    assert shown[0] == f"{path}: 4 examples"
    assert shown[1].split() == ["columns", "query:", "question;", "positive:", "pos;", "negative:", "worse"]
    assert shown[2].split() == ["not", "read", "lang"]
    assert "  positives  of a query: 1" in shown
    assert "  negatives  of a query: 0 to 3 (half up to 2, 95 % up to 3)" in shown
    assert "  words      of a query 3" in shown
    assert "             of a positive 3" in shown
    assert "             of a negative 2" in shown
    assert [line.strip() for line in shown if "query    " in line] == ["query    what is 0", "query    what is 1"]
    assert "    positive one two three" in shown
    (note,) = [line for line in shown if line.startswith("note: ")]
    assert note.startswith(f"note: {path}: not read: 'lang'")


def test_documents_by_id_and_prompts(tmp_path):
    path = write_corpus_id(tmp_path)
    assert "  ids        of corpus wiki: 1 examples" in describe(path).splitlines()
    prompted = write_jsonl(tmp_path / "b.jsonl", [{"query": "q", "pos": ["p"] * 4, "prompt": "Find: "}])
    shown = describe(prompted).splitlines()
    assert "    query    q (after 'Find: ')" in shown
    assert "    positive ... and 2 more" in shown


def test_a_judged_folder_and_a_corpus(tmp_path):
    folder = write_beir(tmp_path / "set", qrels={"train": [("q0", "d0", 1), ("q1", "d1", 0)], "dev": [("q2", "d2", 1)]})
    shown = describe(folder).splitlines()
    assert shown[:4] == [
        f"{folder}: 1 examples",
        "  split      train, of dev, train",
        f"  corpus     {folder / 'corpus.jsonl'}: 6 documents",
        f"  queries    {folder / 'queries.jsonl'}: 4, of which 2 are judged",
    ]
    shown = describe(folder / "corpus.jsonl", first=1).splitlines()
    assert shown[0] == f"{folder / 'corpus.jsonl'}: 6 documents, with ids"
    assert shown[2] == "  d0  text 0"
    listwise = write_jsonl(folder / "listwise.jsonl", [{"query": "q", "docs": ["p", "n"], "labels": [1, 0]}])
    notes = [line for line in describe(listwise).splitlines() if line.startswith("note: ")]
    assert "not read: 'docs', 'labels'" in notes[0]
    assert "shown as documents, since it is not training data" in notes[1]
    assert "none is known to be the positive" in notes[1]


def test_the_command(tmp_path, capsys):
    record = {"query_id": "1", "query_text": "q", "positive_document_ids": ["2"], "frage": "x"}
    path = write_jsonl(tmp_path / "a.jsonl", [record] * 3)
    corpus = write_jsonl(tmp_path / "docs" / "all.jsonl", [{"docid": "2", "text": "a text"}])
    options = ["--corpus", str(corpus), "--columns", "query=frage", "--first", "1"]
    assert run(["data", str(path), *options]) == 0
    shown = capsys.readouterr().out
    assert "query: frage" in shown
    assert "positive a text (id 2)" in shown
    assert "example 2" not in shown
    assert shown.count("note: ") == 1  # that query_text is not read


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, [], "a.jsonl does not exist"),
        ("{oops", [], "a.jsonl, line 1 is not JSON"),
        (json.dumps({"text": "t", "label": 1}), ["--columns", "query=nothing"], "none is known to be the query"),
        (json.dumps({"query": "q", "pos": "p"}), ["--columns", "query=frage"], "columns names 'frage' for 'query'"),
        (json.dumps({"a": "q", "pos": "p"}), ["--columns", "query=a", "query=b"], "name one column, got ['a', 'b']"),
        (json.dumps({"query_text": "q", "positive_document_ids": [1]}), [], "no corpus is given"),
        (json.dumps({"query": "q", "pos": []}), ["--split", "dev"], "line 1: the record has no positive"),
    ],
)
def test_what_cannot_be_shown_ends_in_one_line(tmp_path, capsys, content, options, message):
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_text(content)
    assert run(["data", str(path), *options]) == 1
    caught = capsys.readouterr()
    assert caught.out == ""
    assert message in caught.err
    assert caught.err.count("\n") == 1


def test_training_data_with_a_mistake_is_not_shown_as_documents(tmp_path):
    write_jsonl(tmp_path / "set" / "train.jsonl", [{"query": "q", "pos": "p"}])
    with pytest.raises(ValueError, match=r"has no split 'dev': it has \['train'\]"):
        describe(tmp_path / "set", split="dev")
    (tmp_path / "a.csv").write_text("query,positive\nq,\"['p']\"\n")
    with pytest.raises(ValueError, match=r"a\.csv, line 2 holds a list in a cell"):
        describe(tmp_path / "a.csv")
