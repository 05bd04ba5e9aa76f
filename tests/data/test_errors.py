"""Whatever can be wrong with the data: one clear message each, naming file and line, when it is opened."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inbatch.data import load_retrieval, open_examples
from tests.data_files import one_line, write_beir, write_corpus_id, write_jsonl

BAD_INLINE = {
    "line 3 is no JSON": ([{"query": "q", "pos": "p"}] * 2 + ["{oops"], r"a\.jsonl, line 3 is not JSON .*'\{oops'"),
    "after blank lines": ([{"query": "q", "pos": "p"}, "", "", "{oops"], "line 4 is not JSON"),
    "half a surrogate pair": ([{"query": "\ud83d", "pos": "p"}], "line 1 is not JSON .*surrogate"),
    "no object": ([{"query": "q", "pos": "p"}, [1, 2]], "line 2: expected an object with named columns, found list"),
    "no positive": (
        [{"query": "q", "pos": "p"}, {"query": "q", "pos": []}],
        "line 2: the record has no positive: its 'pos'",
    ),
    "empty positive": ([{"query": "q", "pos": " "}], "line 1: the record has no positive"),
    "no query": (
        [{"query": "q", "pos": "p"}, {"query": None, "pos": "p"}],
        "line 2: expected the query's text in 'query'",
    ),
    "number for a text": ([{"query": "q", "pos": "p", "neg": [3]}], "line 1: expected in 'neg' a text.*found int '3'"),
    "list in a list": ([{"query": "q", "pos": [["p"]]}], "line 1: .* the list 'pos', found a list within it"),
    "ids without texts": ([{"query": "q", "pos_doc": [{"id": "1"}]}], "line 1: .*by id alone need a JSON file"),
    "id of a wrong type": (
        [{"query": "q", "query_id": [1], "pos": "p"}],
        "line 1: expected an id .* in 'query_id', found list",
    ),
    "unknown columns": (
        [{"text": "q", "label": 1}],
        r"\['text', 'label'\] none is known to be the query.*Tevatron.*columns:",
    ),
    "ambiguous columns": (
        [{"query": "q", "pos": "p", "positive": "p"}],
        "several could be the positive: .*'pos', 'positive'",
    ),
    "empty": ([], r"a\.jsonl is empty: expected one record a line"),
}


@pytest.mark.parametrize("name", BAD_INLINE)
def test_bad_inline_file(tmp_path, name):
    records, message = BAD_INLINE[name]
    with pytest.raises(ValueError, match=message) as error:
        open_examples(write_jsonl(tmp_path / "a.jsonl", records))
    one_line(error)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"querry": "query"}, r"unknown field 'querry': the fields are \['query', 'query_id', 'positive'"),
        ({"negative": "negs"}, r"columns names 'negs' for 'negative', but the columns are \['query', 'pos'\]"),
        ({"positive": ["pos", "query"]}, r"columns\['positive'\] must name one column"),
    ],
)
def test_bad_columns(tmp_path, columns, message):
    path = write_jsonl(tmp_path / "a.jsonl", [{"query": "q", "pos": "p"}])
    with pytest.raises(ValueError, match=message) as error:
        open_examples(path, columns=columns)
    one_line(error)


def bad_parquet(tmp_path):
    (tmp_path / "a.parquet").write_text("no")
    return tmp_path / "a.parquet"


def bad_gzip(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl.gz", [{"query": "q", "pos": "p" * i} for i in range(99)])
    path.write_bytes(path.read_bytes()[:-40])
    return path


def plain_folder(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "x.txt").touch()
    return tmp_path / "f"


def text_file(tmp_path):
    (tmp_path / "a.csv").write_text("a,b")
    return tmp_path / "a.csv"


def one_object(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"query": "q", "positive": "p"}, indent=2))
    return tmp_path / "a.json"


def null_positive(tmp_path):
    pq.write_table(pa.table({"anchor": ["a", "b"], "positive": ["p", None]}), tmp_path / "a.parquet")
    return tmp_path / "a.parquet"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tmp_path: tmp_path / "none.jsonl", r"none\.jsonl does not exist: expected \*\.jsonl"),
        (lambda tmp_path: [], "no training data given"),
        (bad_parquet, r"a\.parquet is not a Parquet file"),
        (bad_gzip, r"a\.jsonl\.gz is not a whole gzip file"),
        (plain_folder, r"f holds no data: expected .*found \['x\.txt'\]"),
        (
            one_object,
            r"one object over several lines, .*\['query', 'positive'\]\. Expected one JSON object a line, a list",
        ),
        (text_file, r"a\.csv: no cell of the first line names a known column: str 'a,b'"),
        (null_positive, r"a\.parquet, row 2: the record has no positive"),
    ],
)
def test_bad_source(tmp_path, make, message):
    with pytest.raises(ValueError, match=message) as error:
        open_examples(make(tmp_path))
    one_line(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"qrels": {"dev": [("q0", "d0", 1)], "test": [("q0", "d0", 1)]}},
            r"no qrels split 'train': it has \['dev', 'test'\]",
        ),
        (
            {"qrels": {"train": [("q0", "dx", 1), ("q1", "dy", 1)]}},
            r"train\.tsv, line 2: 'dx' is not in .*corpus\.jsonl, nor is any other judged document",
        ),
        ({"qrels": {"train": [("qx", "d0", 1)]}}, r"train\.tsv, line 2: the query id 'qx' is not in .*queries\.jsonl"),
        (
            {"qrels": {"train": [("q0", "d0", 1), ("q0", "d0", "?")]}},
            r"train\.tsv, line 3: expected query-id, corpus-id and an integer score",
        ),
        (
            {"qrels": {"train": [("q0", "d0")]}},
            r"train\.tsv, line 2: expected query-id, corpus-id and an integer score",
        ),
        ({"qrels": {"train": []}}, r"train\.tsv has no judgements"),
        ({"qrels": {"train": [("q0", "d0", 0)]}}, "no row of qrels split 'train' has a score above 0"),
        (
            {"corpus": [{"_id": "d0", "text": "a"}, {"_id": "d1", "text": "b"}, {"_id": "d0", "text": "c"}]},
            r"line 3: the id 'd0' is taken by .*line 1",
        ),
        (
            {"corpus": [{"_id": "d0", "text": "a"}, {"text": "b"}]},
            r"corpus\.jsonl, line 2: expected an id .* found \{text: str\}",
        ),
        (
            {"corpus": [{"_id": "d0", "text": 5}]},
            r"corpus\.jsonl, line 1: expected an id .* found \{_id: str, text: int\}",
        ),
        ({"corpus": [{"_id": "d0", "text": "a"}, "nope"]}, r"corpus\.jsonl, line 2 is not JSON"),
    ],
)
def test_bad_beir_folder(tmp_path, change, message):
    folder = write_beir(tmp_path / "set", **change)
    with pytest.raises(ValueError, match=message) as error:
        open_examples(folder)
    one_line(error)
    if "score above 0" not in message:
        with pytest.raises(ValueError, match=message):
            load_retrieval(folder, "train")


def test_a_first_line_with_a_number_is_no_header(tmp_path):
    folder = write_beir(tmp_path / "set", header=False, qrels={"test": [("q0", "d0", "0.5"), ("q1", "d1", 1)]})
    with pytest.raises(
        ValueError, match=r"test\.tsv, line 1: .*an integer score .*found str 'q0\\td0\\t0\.5'"
    ) as error:
        load_retrieval(folder)
    one_line(error)


def test_incomplete_beir_folder(tmp_path):
    folder = write_beir(tmp_path / "set")
    (folder / "queries.jsonl").unlink()
    with pytest.raises(ValueError, match=r"set has no queries\.jsonl \(nor queries\.jsonl\.gz\)") as error:
        load_retrieval(folder)
    one_line(error)
    with pytest.raises(ValueError, match="is not a folder"):
        load_retrieval(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="leave `columns` out"):
        open_examples(write_beir(tmp_path / "other"), columns={"query": "q"})


QUESTION = {"question_id": "1", "question": "why?", "corpus_id": "wiki", "pos_doc": [{"id": 1}]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            [QUESTION, QUESTION | {"neg_doc": ["99"]}],
            r"train\.json, record 2: neg_doc names the document '99', which is not in corpus 'wiki'",
        ),
        ([QUESTION | {"pos_doc": []}], "record 1: the record has no positive"),
        ([QUESTION | {"pos_doc": [{"text": "inline"}]}], "record 1: pos_doc names the document None"),
        ([QUESTION | {"corpus_id": "web"}], r"record 1: corpus_id is 'web', but the file's corpora are \['wiki'\]"),
        ([QUESTION | {"question": ""}], "record 1: expected the query's text in 'question'"),
        (["text"], "record 1: expected an object with named columns, found str"),
        ([], r"train\.json is empty"),
        ({"a": 1}, r"train\.json .*expected \[ at byte 66, found '\{'\. Expected .* \{corpus"),
    ],
)
def test_bad_corpus_id_json(tmp_path, data, message):
    with pytest.raises(ValueError, match=message) as error:
        open_examples(write_corpus_id(tmp_path, data=data))
    one_line(error)


def test_bad_corpus_folder(tmp_path):
    path = write_corpus_id(tmp_path)
    metadata = tmp_path / "corpus" / "merlin_metadata.json"
    metadata.write_text('{"class": "ColPaliDataset", "corpus_id": "wiki"}')
    with pytest.raises(ValueError, match=r"expected \{class: TextQADataset, corpus_id: <name>\}, found"):
        open_examples(path)
    metadata.unlink()
    with pytest.raises(ValueError, match=r"merlin_metadata\.json does not exist"):
        open_examples(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"train\.json is not JSON"):
        open_examples(path)
