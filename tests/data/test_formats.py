"""Every format of docs/formats.md: what is read, what is said to be unread, where the field is tolerant."""

import gzip
import json
import re
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inbatch.data import Collator, Example, Passage, index, load_retrieval, open_corpus, open_examples
from inbatch.retrieval.mine import open_mining_set
from tests.data_files import one_line, texts, tokenize, write_beir, write_corpus_id, write_jsonl

BOM = "\ufeff"


def parts(example: Example) -> tuple[str, list[str], list[str]]:
    return example.query, texts(example.positives), texts(example.negatives)


def keys(examples, **options) -> tuple[list[int], list[int]]:
    """Query ids and passage ids of one batch of all examples."""
    collate = Collator(tokenize, query_max_len=50, passage_max_len=50, same=examples.same, **options)
    batch = collate(list(examples), 0)
    return batch.query_ids.tolist(), batch.passage_ids.tolist()


def said(caught) -> list[str]:
    """The warnings, each of one line."""
    messages = [str(warning.message) for warning in caught]
    assert not any("\n" in message for message in messages)
    return messages


def test_the_table_of_formats_says_what_is_read_and_what_is_not(tmp_path):
    table = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| `(\{.*?\})` \| [^|]* \| ([^|]*) \|$", table, re.MULTILINE)
    tried = []
    for format_, record, unread in rows:
        if '"n"' not in record and "ctxs" not in record and '"p"' not in record:
            continue  # documents by id, which need a corpus
        path = write_jsonl(tmp_path / f"{format_}.jsonl", [record := json.loads(record.replace("[[...]]", "[]"))])
        query, positives, negatives = parts(open_examples(path)[0])
        assert (query, negatives) == ("q", ["n"] if '"n"' in json.dumps(record) else []), format_
        assert positives in (["p"], ["t p"]), format_
        for name in re.findall("`([a-z_]+)`", unread):
            write_jsonl(path, [record | {name: "x"}])
            if format_ == "pairs":  # where only a label is named, and refused
                continue
            with pytest.warns(UserWarning, match=f"not read: .*'{name}'"):
                open_examples(path)
        tried.append(format_)
    assert tried == [
        "sentence-transformers", "pairs", "FlagEmbedding", "NeMo, inline", "Tevatron", "ms-swift", "DPR",
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------------- column names


@pytest.mark.parametrize(
    "name",
    [
        "hard_negatives", "hard_negative", "negatives", "negative", "neg", "negs", "neg_1", "neg1", "negative-1",
        "negative_doc", "neg_docs", "neg_text", "negative_texts", "negative_passages", "hard_neg", "hardNegatives",
        "Negative", "HARD NEGATIVES", "mined_negatives", "bm25_negatives", "rejected_response", "negative_ctxs",
        "hard_negative_ctxs",
    ],
)  # fmt: skip
@pytest.mark.parametrize("query", ["anchor", "query", "question"])
def test_negatives_under_any_usual_name(tmp_path, name, query):
    record = {query: "q", "positive": "p", name: ["n", "m"]}
    path = write_jsonl(tmp_path / "a.jsonl", [record])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parts(open_examples(path)[0]) == ("q", ["p"], ["n", "m"])


def test_all_columns_of_negatives_count_hard_ones_first(tmp_path):
    record = {"query": "q", "pos": "p", "negative_10": "n10", "negative_2": "n2", "neg": ["n"], "hard_negatives": ["h"]}
    path = write_jsonl(tmp_path / "a.jsonl", [record])
    assert parts(open_examples(path)[0])[2] == ["h", "n", "n2", "n10"]


def test_several_columns_can_be_named(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"query": "q", "pos": "p", "a": ["x"], "b": "y", "neg": "z"}])
    with pytest.warns(UserWarning, match="not read: 'neg'") as caught:
        examples = open_examples(path, columns={"negative": ["a", "b"]})
    assert parts(examples[0])[2] == ["x", "y"]
    assert len(said(caught)) == 1


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv", "tsv"])
def test_what_is_not_read_is_named_once(tmp_path, suffix):
    record = {"query": "q", "positive": "p", "lang": "en", "label": "1"}
    path = write_table(tmp_path / f"a.{suffix}", [record] * 5)
    with pytest.warns(UserWarning, match="not read") as caught:
        open_examples(path)
    (message,) = said(caught)
    assert message.startswith(
        f"{path}: not read: 'lang', 'label'. Name what is to be read by columns, such as columns: {{"
    )


def test_an_empty_column_need_not_be_named(tmp_path):
    record = {"_id": "1", "text": "t", "metadata": {}, "tags": [], "url": "", "none": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(open_corpus(write_jsonl(tmp_path / "a.jsonl", [record]))) == 1
    with pytest.warns(UserWarning, match=r"a\.jsonl: not read: 'metadata'"):
        open_corpus(write_jsonl(tmp_path / "a.jsonl", [record | {"metadata": {"url": "x"}}]))


def test_the_names_may_differ_from_line_to_line(tmp_path):
    records = [
        {"query": "a", "pos_doc": "p"},
        {"question": "b", "pos_doc": ["p"], "neg_doc": "n"},
        {"anchor": "c", "pos": "r"},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    assert [e.query for e in open_examples(path)] == ["a", "b", "c"]
    table = write_table(
        tmp_path / "a.parquet",
        [{"query": "a", "question": None, "pos": "p"}, {"query": None, "question": "b", "pos": "p"}],
    )
    assert [e.query for e in open_examples(table)] == ["a", "b"]
    with pytest.raises(
        ValueError, match=r"line 1: the record lacks 'question', which columns names for the query"
    ) as error:
        open_examples(path, columns={"query": "question"})
    one_line(error)


def test_columns_count_where_they_fit(tmp_path):
    own = write_jsonl(tmp_path / "own.jsonl", [{"frage": "f", "antwort": "a", "query": "?"}])
    usual = write_jsonl(tmp_path / "usual.jsonl", [{"query": "q", "positive": "p"}])
    beir = write_beir(tmp_path / "beir")
    columns = {"query": "frage", "positive": "antwort"}
    with pytest.warns(UserWarning, match=r"own\.jsonl: not read: 'query'"):
        examples = open_examples([own, usual, beir], columns=columns)
    assert [e.query for e in examples] == ["f", "q", "query 0", "query 1"]
    examples = open_examples([usual, {"path": str(own), "columns": columns}])
    assert [parts(e)[:2] for e in examples] == [("q", ["p"]), ("f", ["a"])]
    with pytest.raises(ValueError, match=r"columns names 'fragen' for 'query', but the columns are .*'frage'") as error:
        open_examples([own, usual], columns={"query": "fragen", "positive": "antwort"})
    one_line(error)
    with pytest.warns(UserWarning, match=r"usual\.jsonl: columns names 'qery' for 'query', but no record has it"):
        open_examples([own, {"path": usual, "columns": {"query": "qery"}}], columns=columns)
    with pytest.raises(ValueError, match="beir is a judged folder, whose columns are fixed"):
        open_examples([usual, {"path": beir, "columns": columns}])


def test_numbered_positives(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"query": "q", "positive_1": "p1", "positive_2": ["p2", "p3"]}])
    assert parts(open_examples(path)[0])[1] == ["p1", "p2", "p3"]


# -------------------------------------------------------------------------------------------- formats of other trainers


def test_flag_embedding_prompt(tmp_path):
    record = {"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": [1], "neg_scores": [0], "type": "normal"}
    path = write_jsonl(tmp_path / "a.jsonl", [record | {"prompt": "Find: "}, record, record | {"prompt": ""}])
    with pytest.warns(UserWarning, match="not read: 'type'"):
        examples = open_examples(path)
    assert [(e.query, e.scores) for e in examples] == [("q", (1.0, 0.0))] * 3
    batch = Collator(tokenize, query_max_len=50, passage_max_len=50, query_prefix="query: ")(list(examples), 0)
    decoded = ["".join(map(chr, row[row != 0])) for row in batch.queries["input_ids"]]
    assert decoded == ["Find: q", "query: q", "q"]  # it stands instead of the usual instruction, as its README says


SCORES = [
    ({"pos": ["p", "p2"], "neg": ["n", "p"], "pos_scores": [3, 2.5], "neg_scores": [1, 9]}, (3.0, 2.5, 1.0), []),
    ({"pos": ["p"], "pos_scores": [3]}, (3.0,), []),
    ({"positive": "p", "negative_1": "n", "negative_2": "m", "label": [5.0, 1.0, 0.5]}, (5.0, 1.0, 0.5), []),
    ({"positive": "p", "negative_1": "n", "negative_2": "m", "score": [4.0, 4.5]}, (0.0, -4.0, -4.5), []),
    ({"pos": ["p"], "neg": ["n"], "pos_scores": [3]}, (), ["pos_scores"]),
    ({"pos": ["p"], "neg": ["n"], "pos_scores": [3], "neg_scores": [1, 2]}, (), ["pos_scores", "neg_scores"]),
    (
        {"pos": ["p"], "neg": ["n"], "pos_scores": [float("nan")], "neg_scores": [10**400]},
        (),
        ["pos_scores", "neg_scores"],
    ),
    ({"positive": "p", "negative": "n", "labels": [True, False]}, (), ["labels"]),
]


@pytest.mark.parametrize(("record", "scores", "unread"), SCORES)
@pytest.mark.filterwarnings("ignore:.*have a negative that equals")
def test_scores_of_a_teacher(tmp_path, record, scores, unread):
    path = write_jsonl(tmp_path / "a.jsonl", [{"query": "q", **record}])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        examples = open_examples(path)
    assert examples[0].scores == scores
    said = " ".join(str(one.message) for one in caught if "not read" in str(one.message))
    assert re.findall("'(.*?)'", said) == unread
    if unread == ["pos_scores"]:
        with pytest.raises(
            ValueError, match=r"in 'pos_scores' a finite number for each passage, of 1 positives and 1 neg"
        ):
            open_examples(path, columns={"positive_scores": "pos_scores"})


def test_scores_follow_the_passages_of_a_batch(tmp_path):
    records = [
        {"query": "a", "pos": ["p", "r"], "neg": ["n", "m", "o"], "pos_scores": [9, 8], "neg_scores": [1, 2, 3]},
        {"query": "b", "pos": ["p"], "neg": ["n"]},
    ]
    examples = list(open_examples(write_jsonl(tmp_path / "a.jsonl", records)))
    options = {"query_max_len": 50, "passage_max_len": 50, "train_n_passages": 3, "teacher_scores": True}
    for epoch, expected in ((0, [9.0, 1.0, 2.0]), (1, [8.0, 3.0, 1.0])):
        scores = Collator(tokenize, **options)(examples, epoch).teacher_scores
        assert scores[0].tolist() == expected
        assert scores[1].isnan().all()
        repeated = Collator(tokenize, **{**options, "train_n_passages": 5}, rotate_passages=False)(examples, epoch)
        assert repeated.teacher_scores[0].tolist() == [9.0, 1.0, 2.0, 3.0, 1.0]
    assert Collator(tokenize, **options)([], 0).teacher_scores.shape == (0, 0)
    assert Collator(tokenize, **{**options, "teacher_scores": False})(examples, 0).teacher_scores is None


DPR = {
    "dataset": "nq",
    "question": "q",
    "answers": ["a"],
    "positive_ctxs": [{"title": "T", "text": "p", "score": 1000, "title_score": 1, "passage_id": "7"}],
    "negative_ctxs": [{"title": "", "text": "n", "score": 0, "title_score": 0, "passage_id": "8"}],
    "hard_negative_ctxs": [{"title": "H", "text": "h", "score": 1, "title_score": 0, "passage_id": "9"}],
}


def test_dpr(tmp_path):
    path = tmp_path / "nq-train.json"
    path.write_text(json.dumps([DPR] * 2, indent=1))
    with pytest.warns(UserWarning, match="not read") as caught:
        examples = open_examples(path)
    assert examples[1] == Example(
        query="q",
        positives=(Passage("p", "T", "7"),),
        negatives=(Passage("h", "H", "9"), Passage("n", "", "8")),
        corpus=str(path),
    )
    (message,) = said(caught)
    assert "not read: 'dataset', 'answers', 'positive_ctxs.score', 'positive_ctxs.title_score'" in message


def test_dpr_records_without_a_positive_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "_PART_BYTES", 1000)
    path = tmp_path / "nq-train.json"
    lacking = {**DPR, "positive_ctxs": []}
    records = [{**(lacking if number % 5 in (0, 3) else DPR), "question": f"q{number}"} for number in range(40)]
    path.write_text(json.dumps(records))
    with pytest.warns(UserWarning, match="have no positive") as caught:
        examples = open_examples(path)
    assert any("16 of 40 records have no positive, as DPR's may, and are left out" in line for line in said(caught))
    assert [e.query for e in examples] == [f"q{n}" for n in range(40) if n % 5 not in (0, 3)]
    assert examples.where(1).endswith("record 3")
    path.write_text(json.dumps([lacking]))
    with pytest.raises(ValueError, match=r"nq-train.json: no record has a positive"):
        open_examples(path)


def test_ms_swift(tmp_path):
    def message(text, role="user"):
        return [{"role": role, "content": text}]

    record = {"messages": message("q"), "positive_messages": [message("p"), message("r", "assistant")]}
    path = write_jsonl(tmp_path / "a.jsonl", [record | {"negative_messages": [message("n"), message("m")]}])
    assert parts(open_examples(path)[0]) == ("q", ["p", "r"], ["n", "m"])
    older = {"query": "q", "response": "p", "rejected_response": ["n", "m"]}
    assert parts(open_examples(write_jsonl(tmp_path / "b.jsonl", [older]))[0]) == ("q", ["p"], ["n", "m"])
    two = {"messages": message("be brief", "system") + message("q"), "positive_messages": [message("p")]}
    with pytest.raises(
        ValueError, match=r"c\.jsonl, line 1: expected the query's text in 'messages', found list"
    ) as error:
        open_examples(write_jsonl(tmp_path / "c.jsonl", [two]))
    one_line(error)


TEVATRON = {
    "query_id": "7", "query_text": "q", "positive_document_ids": ["d1"], "negative_document_ids": ["d2", "d3"],
    "query_image": None,
}  # fmt: skip
CORPUS = [{"docid": f"d{i}", "title": "T" if i == 2 else None, "text": f"text {i}"} for i in range(5)]


@pytest.mark.parametrize("place", ["file", "folder", "given", "given for the source", "object"])
def test_tevatron_with_a_corpus(tmp_path, place):
    path = write_jsonl(tmp_path / "data" / "train.jsonl", [TEVATRON] * 3)
    beside = place in ("file", "folder")
    corpus = write_jsonl(
        (path.parent if beside else tmp_path) / ("corpus.jsonl.gz" if beside else "wiki.jsonl"), CORPUS
    )
    source, options = {
        "file": (path, {}),
        "folder": (path.parent, {}),
        "given": (path, {"corpus": str(corpus)}),
        "given for the source": ({"path": path, "corpus": corpus}, {}),
        "object": ([TEVATRON] * 3, {"corpus": CORPUS}),
    }[place]
    examples = open_examples(source, **options)
    assert len(examples) == 3
    assert (examples[2].query, examples[2].query_id) == ("q", "7")
    assert examples[2].positives == (Passage("text 1", "", "d1"),)
    assert examples[2].negatives == (Passage("text 2", "T", "d2"), Passage("text 3", "", "d3"))


def test_documents_named_by_id_need_a_corpus(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", [TEVATRON])
    with pytest.raises(
        ValueError, match=r"train\.jsonl, line 1: the record names documents by id, but no corpus"
    ) as error:
        open_examples(path)
    one_line(error)
    write_jsonl(tmp_path / "corpus.jsonl", CORPUS[:2])
    with pytest.raises(
        ValueError, match=r"line 1: negative_document_ids names the document 'd2', which is not in"
    ) as error:
        open_examples(path)
    one_line(error)
    inline = write_jsonl(tmp_path / "inline.jsonl", [{"query": "q", "pos": "p", "pos_ids": ["1"]}])
    with pytest.warns(UserWarning, match="not read: 'pos_ids'"):
        assert parts(open_examples(inline)[0]) == ("q", ["p"], [])
    with pytest.warns(UserWarning, match=r"corpus\.jsonl.* is not used: no record names documents by id"):
        open_examples(write_jsonl(tmp_path / "b.jsonl", [{"query": "q", "pos": "p"}]), corpus=tmp_path / "corpus.jsonl")


@pytest.mark.parametrize("kind", ["judged", "datasets"])
def test_documents_named_by_id_may_lie_in_a_folder(tmp_path, recwarn, monkeypatch, kind):
    path, place = write_jsonl(tmp_path / "train.jsonl", [TEVATRON]), tmp_path / "docs"
    monkeypatch.setattr(index, "_SMALL", 0)  # what is found is kept
    if kind == "datasets":
        pytest.importorskip("datasets").Dataset.from_list(CORPUS).save_to_disk(str(place))
    else:
        write_beir(
            place, qrels={"some": [("q0", "d0", 1)]}, corpus=[{"_id": f"d{i}", "text": f"t{i}"} for i in range(4)]
        )
    assert len(open_examples(path, corpus=place)[0].negatives) == 2
    assert not recwarn.list, "no part of the folder is left out"
    if kind == "judged":
        write_jsonl(place / "corpus.jsonl", [{"_id": "d1", "text": "t"}])
        with pytest.raises(ValueError, match="the document 'd2', which is not in"):
            open_examples(path, corpus=place)


def test_nemo_instructions_and_samples(tmp_path):
    path = write_corpus_id(tmp_path)
    metadata = {
        "class": "TextQADataset",
        "corpus_id": "wiki",
        "query_instruction": "Ask:",
        "passage_instruction": "Doc:",
    }
    (tmp_path / "corpus" / "merlin_metadata.json").write_text(json.dumps(metadata | {"task_type": "qa"}))
    with pytest.warns(UserWarning, match=r"merlin_metadata\.json: not read: 'task_type'"):
        examples = open_examples(path)
    batch = Collator(tokenize, query_max_len=50, passage_max_len=50, query_prefix="query: ")(list(examples), 0)
    assert "".join(map(chr, batch.queries["input_ids"][0])) == "Ask: why?"
    assert "".join(map(chr, batch.passages["input_ids"][0])) == "Doc: doc 1"

    many = write_jsonl(tmp_path / "many.jsonl", [{"query": f"q{i}", "pos": "p"} for i in range(50)])
    sampled = open_examples([{"path": many, "num_samples": 7}, many])
    assert len(sampled) == 57
    assert len({e.query for e in sampled[:7]}) == 7
    assert sampled[:7] == open_examples({"path": many, "num_samples": 7})[:]
    assert sampled[:7] != open_examples({"path": many, "num_samples": 7}, seed=1)[:]
    with pytest.warns(UserWarning, match="num_samples is 99, but there are 50: all are taken"):
        assert len(open_examples({"path": many, "num_samples": 99})) == 50
    for bad in (0, -1, True, "3"):
        with pytest.raises(ValueError, match=r"many\.jsonl: num_samples is .*expected a whole number of at least 1"):
            open_examples({"path": many, "num_samples": bad})
    with pytest.raises(ValueError, match=r"a source has the unknown settings \['weigth'\]: expected \['path'"):
        open_examples({"path": many, "weigth": 1})


def test_nemo_inline_object(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(
        json.dumps({"data": [{"query": "a", "pos_doc": "p"}, {"question": "b", "pos_doc": "p"}], "version": 1})
    )
    with pytest.warns(UserWarning, match=r"a\.json: not read: 'version'"):
        assert [e.query for e in open_examples(path)] == ["a", "b"]


def test_a_nemo_corpus_folder_with_a_test_split(tmp_path):
    path = write_corpus_id(tmp_path)
    pq.write_table(pa.Table.from_pylist([{"id": 1, "text": "another"}]), tmp_path / "corpus" / "test.parquet")
    with pytest.warns(UserWarning, match=r"corpus: not read: 'test\.parquet'"):
        assert texts(open_examples(path)[0].positives) == ["doc 1", "doc 2"]


def test_a_corpus_id_that_is_a_document_id_changes_nothing(tmp_path):
    records = [{"query": f"q{i}", "positive": "same", "corpus_id": f"doc{i}"} for i in range(2)]
    with pytest.warns(UserWarning, match="not read: 'corpus_id'"):
        examples = open_examples(write_jsonl(tmp_path / "a.jsonl", records))
    _, (first, second) = keys(examples)
    assert first == second


# ------------------------------------------------------------------------------------------------------- kinds of files


def write_table(path: Path, records: list[dict]) -> Path:
    """Records of texts as JSONL, Parquet, CSV or TSV, by the name."""
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif kind == "jsonl":
        write_jsonl(path, records)
    else:
        mark = {"csv": ",", "tsv": "\t"}[kind]
        rows = [list(records[0]), *(record.values() for record in records)]
        quoted = [
            mark.join(
                '"' + cell.replace('"', '""') + '"'
                if (cell and cell[0] == '"') or mark in cell or "\n" in cell
                else cell
                for cell in row
            )
            for row in rows
        ]
        data = ("\n".join(quoted) + "\n").encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


AWKWARD = ["plain", "a, b\tc", "two\nlines\n\nand more", '"quoted" text', 'inch 5" wide', "ünï 😀", " spaces "]


@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "tsv", "tsv.gz", "parquet", "jsonl"])
def test_texts_come_through_whole(tmp_path, suffix):
    records = [{"query": f"q{i}", "positive": text, "negative": ""} for i, text in enumerate(AWKWARD)]
    examples = open_examples(write_table(tmp_path / f"a.{suffix}", records))
    assert [parts(e) for e in examples] == [(f"q{i}", [text], []) for i, text in enumerate(AWKWARD)]


def test_quotes_of_a_tsv_are_text_where_they_do_not_obey_csv(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('query\tpositive\n"The Raven" by Poe\tp\n"unclosed\tr\n')
    assert [parts(e)[:2] for e in open_examples(path)] == [('"The Raven" by Poe', ["p"]), ('"unclosed', ["r"])]


def test_a_csv_with_semicolons_and_crlf(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes((BOM + 'query;positive\r\na;"p;r"\r\n\r\nb;s\r\n').encode())
    assert [parts(e)[:2] for e in open_examples(path)] == [("a", ["p;r"]), ("b", ["s"])]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "query,positive\na,b,c\n", r"a\.csv, line 2 is not CSV: 3 cells, expected 2: \['query', 'pos"),
        ("a.csv", 'query,positive\na,b\nc,"d\n', r"a\.csv, line 3 is not CSV: unexpected end of data"),
        ("a.csv", 'query,positive\na,"b"c\n', r"a\.csv, line 2 is not CSV: ',' expected after '\"'"),
        ("a.tsv", "query\tpositive\na\n", r"a\.tsv, line 2 has 1 cells, expected 2"),
        ("a.csv", b"query,positive\na,b\nc,\xe9\n", r"^[^ ]*a\.csv, line 3 is not UTF-8 .*0xe9"),
        ("a.csv", "query,positive,query\na,b,c\n", r"a\.csv: the columns \['query'\] stand there twice"),
        ("a.tsv", "one\ttwo\nthree\tfour\n", r"a\.tsv: no cell of the first line names .*column: str 'one\\ttwo'"),
        ("a.csv", "query,pos,neg\nq,p,n\nq,p,\"['n', 'm']\"\n", r"a\.csv, line 3 holds a list in a cell, str .*'n'"),
        ("a.csv", "", r"a\.csv is empty"),
        ("a.csv", "query,positive\n", r"a\.csv is empty"),
        ("a.jsonl", '{"query": "a", "query": "b"}', r"a\.jsonl, line 1 is not JSON \(the key 'query' stands twice"),
        ("a.xlsx", "PK", r"a\.xlsx is of no known kind: expected \*\.jsonl"),
    ],
)  # fmt: skip
def test_malformed_tables(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        open_examples(tmp_path / name)
    one_line(error)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv"])
def test_a_byte_order_mark_belongs_to_no_text(tmp_path, suffix):
    record = {"query": "q", "positive": "p"}
    text = {"jsonl": json.dumps(record), "json": json.dumps([record], indent=1)}.get(suffix)
    mark = {"csv": ",", "tsv": "\t"}.get(suffix, "")
    path = tmp_path / f"a.{suffix}"
    path.write_text(BOM + (text or f"query{mark}positive\nq{mark}p\n"), encoding="utf-8")
    assert parts(open_examples(path)[0]) == ("q", ["p"], [])
    path.write_text(BOM + (f"id{mark}text\n1{mark}t\n" if mark else '{"_id": "1", "text": "t"}'), encoding="utf-8")
    if suffix != "json":
        assert list(open_corpus(path)) == [Passage("t", "", "1")]


@pytest.mark.parametrize(
    "names",
    [
        ("query", "document"), ("Query", "Passage"), ("question", "answer"), ("question", "context"),
        ("sentence1", "sentence2"), ("sentence_A", "sentence_B"), ("text 1", "text 2"), ("question1", "question2"),
        ("premise", "hypothesis"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "tsv"])
def test_pairs_are_read_unless_a_label_says_that_some_are_none(tmp_path, names, suffix):
    record = dict(zip(names, ("q", "p"), strict=True))
    pair = write_table(tmp_path / f"pair.{suffix}", [record | {"negative": "n"}])
    assert parts(open_examples(pair)[0]) == ("q", ["p"], ["n"])
    for label in ("label", "is_duplicate", "similarity_score"):
        labelled = write_table(tmp_path / f"{label}.{suffix}", [record | {label: "1"}])
        with pytest.raises(
            ValueError, match=rf"\['{label}'\] may mark pairs that are not positive.*\{{query: "
        ) as error:
            open_examples(labelled)
        one_line(error)
        with pytest.warns(UserWarning, match=f"not read: '{label}'"):
            named = open_examples(labelled, columns={"query": names[0], "positive": names[1]})
        assert parts(named[0]) == ("q", ["p"], [])


def test_other_columns_come_before_those_of_pairs(tmp_path):
    record = {"query": "q", "answer": "a", "positive": "p", "score": 0.5}
    with pytest.warns(UserWarning, match="not read: 'answer', 'score'"):
        assert parts(open_examples(write_jsonl(tmp_path / "a.jsonl", [record]))[0]) == ("q", ["p"], [])


# ---------------------------------------------------------------------------------------------------- folders and globs


def shards(folder: Path, *names: str) -> Path:
    for name in names:
        write_table(folder / name, [{"query": name, "positive": "p"}])
    return folder


def test_shards_of_a_split(tmp_path):
    folder = shards(
        tmp_path / "hub", "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
        "data/validation-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", ".cache/train.jsonl",
    )  # fmt: skip
    (folder / "README.md").write_text("card")
    (folder / "dataset_infos.json").write_text("{}")
    assert [e.query for e in open_examples(folder)] == [f"data/train-0000{i}-of-00002.parquet" for i in range(2)]
    for split in ("dev", "validation"):
        assert [e.query for e in open_examples(folder, split=split)] == ["data/validation-00000-of-00001.parquet"]
    (folder / "data/train-00000-of-00002.parquet").unlink()
    with pytest.warns(UserWarning, match=r"hub: of 2 files train-\*-of-00002\.parquet 1 are there, and read"):
        assert len(open_examples(folder)) == 1
    with pytest.raises(ValueError, match=r"hub has no split 'trial': it has \['dev', 'test', 'train'\]") as error:
        open_examples(folder, split="trial")
    one_line(error)


def test_shards_without_splits_and_mixed_kinds(tmp_path):
    folder = shards(tmp_path / "a", "0.jsonl", "1.csv", "2.parquet", "3.tsv.gz")
    assert [e.query for e in open_examples(folder)] == ["0.jsonl", "1.csv", "2.parquet", "3.tsv.gz"]
    with pytest.raises(ValueError, match="has no split 'test'"):
        open_examples(folder, split="test")
    (folder / "train.jsonl").write_text('{"query": "t", "positive": "p"}')
    with pytest.warns(UserWarning, match=r"a: not read: '0\.jsonl', '1\.csv'"):
        assert [e.query for e in open_examples(folder)] == ["t"]


def test_globs(tmp_path):
    folder = shards(tmp_path, "x/0.jsonl", "x/1.jsonl", "y/2.jsonl", "y/3.txt.jsonl")
    assert [e.query for e in open_examples(str(folder / "*" / "?.jsonl"))] == ["x/0.jsonl", "x/1.jsonl", "y/2.jsonl"]
    with pytest.raises(ValueError, match=r"\*\.csv matches no file: expected") as error:
        open_examples(str(folder / "*.csv"))
    one_line(error)
    with pytest.raises(
        ValueError, match=r"holds several sets, in .*x.*y.*: name one of them, or all by a glob such as"
    ) as error:
        open_examples(folder)
    advice = one_line(error).rsplit(" ", 1)[1].strip("'")
    assert len(open_examples(advice)) == 4


# ----------------------------------------------------------------------------------------------------- Python's objects


def test_sequences_of_mappings():
    records = [{"query": f"q{i}", "positive": "p", "neg": ["n"]} for i in range(3)]
    assert [parts(e) for e in open_examples(records)] == [(f"q{i}", ["p"], ["n"]) for i in range(3)]
    with pytest.raises(ValueError, match="the given list, record 2: the record has no positive"):
        open_examples([records[0], {"query": "q", "positive": ""}])


def test_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    records = [{"query": f"q{i}", "positive": "p", "neg": ["n"], "other": 1} for i in range(3)]
    data = datasets.Dataset.from_list(records)
    both = datasets.DatasetDict({"train": data, "test": data.select([2])})
    data.save_to_disk(tmp_path / "one")
    both.save_to_disk(tmp_path / "two")
    for source in (data, both, tmp_path / "one", str(tmp_path / "two")):
        with pytest.warns(UserWarning, match="not read: 'other'"):
            assert [parts(e) for e in open_examples(source)] == [(f"q{i}", ["p"], ["n"]) for i in range(3)]
    with pytest.warns(UserWarning, match="not read: 'other'"):
        assert [e.query for e in open_examples([both, data], split="test")] == ["q2", "q0", "q1", "q2"]
    with pytest.raises(ValueError, match=r"two has no split 'dev': it has \['train', 'test'\]"):
        open_examples(tmp_path / "two", split="dev")
    for wrong in (data.to_iterable_dataset(), data.to_pandas(), pa.Table.from_pylist(records), iter(records)):
        with pytest.raises(ValueError, match=r"^the given [a-zA-Z_]+ is not a sequence of records: expected a list of"):
            open_examples(wrong)
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"one cannot be read by datasets\.load_from_disk") as error:
        open_examples(tmp_path / "one")
    one_line(error)


# --------------------------------------------------------------------------------------------------------- one identity


def test_equal_texts_are_one_in_every_format(tmp_path):
    beir = write_beir(
        tmp_path / "beir", corpus=[{"_id": "a", "text": "same"}, {"_id": "b", "text": "same"}],
        qrels={"train": [("q0", "a", 1), ("q1", "b", 1)]},
    )  # fmt: skip
    passage = {"title": "", "text": "same "}
    tevatron = [
        {"query_id": i, "query": "query 0", "positive_passages": [passage | {"docid": f"x{i}"}]} for i in range(2)
    ]
    nemo = write_corpus_id(
        tmp_path / "nemo", documents=[{"id": i, "text": "same"} for i in range(3)],
        data=[{"question_id": i, "question": "query 0", "corpus_id": "wiki", "pos_doc": [{"id": i}]} for i in range(2)],
    )  # fmt: skip
    sources = [
        beir,
        write_jsonl(tmp_path / "tevatron.jsonl", tevatron),
        nemo,
        write_jsonl(tmp_path / "pairs.jsonl", [{"anchor": "query  0", "positive": "same"}]),
        write_table(tmp_path / "pairs.csv", [{"query": "query 0", "positive": "same"}]),
    ]
    query_ids, passage_ids = keys(open_examples(sources))
    assert len(set(passage_ids)) == 1
    assert len(set(query_ids)) == 2  # query 0 and query 1
    assert len(query_ids) == 8


def test_equal_ids_are_one_within_their_corpus_and_across_its_files(tmp_path):
    def record(query_id, query, docid, text, **more):
        return {"query_id": query_id, "query": query, "positive_passages": [{"docid": docid, "text": text}], **more}

    own = write_jsonl(tmp_path / "own.jsonl", [record("1", "why", "a", "x"), record("1", "why not", "a", "y")])
    other = write_jsonl(tmp_path / "other.jsonl", [record("1", "how", "a", "z")])
    query_ids, passage_ids = keys(open_examples([own, other]))
    assert query_ids[0] == query_ids[1] != query_ids[2]
    assert passage_ids[0] == passage_ids[1] != passage_ids[2]
    shared = [
        write_jsonl(tmp_path / f"{i}.jsonl", [record("1", f"query {i}", "a", f"text {i}", corpus_id="wiki")])
        for i in range(2)
    ]
    for ids in keys(open_examples(shared)):
        assert ids[0] == ids[1]


# ---------------------------------------------------------------------------------------------------- retrieval folders


def test_mteb_folder(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": f"text {i}"} for i in range(4)])
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "q0", "text": "query 0"}, {"_id": "q1", "text": "query 1"}])
    rows = [("q0", "d0", 1), ("q0", "d1", 0), ("q1", "d2", 2.0)]
    records = [dict(zip(("query-id", "corpus-id", "score"), row, strict=True)) for row in rows]
    write_jsonl(tmp_path / "qrels" / "test.jsonl", records)
    data = load_retrieval(tmp_path)
    assert data.qrels == {"q0": {"d0": 1, "d1": 0}, "q1": {"d2": 2}}
    assert data.queries == ["query 0", "query 1"]
    examples = open_examples(tmp_path, split="test")
    assert [parts(e) for e in examples] == [("query 0", ["text 0"], ["text 1"]), ("query 1", ["text 2"], [])]


def test_mteb_folder_as_on_the_hub(tmp_path):
    write_table(tmp_path / "corpus" / "test-00000-of-00001.parquet", [{"id": "d0", "title": "", "text": "text 0"}])
    for split, text in (("train", "no"), ("test", "query 0")):
        write_table(tmp_path / "queries" / f"{split}-00000-of-00001.parquet", [{"id": "q0", "text": text}])
    judged = pa.Table.from_pylist([{"query-id": "q0", "corpus-id": "d0", "score": 1.0}])
    (tmp_path / "data").mkdir()
    pq.write_table(judged, tmp_path / "data" / "test-00000-of-00001.parquet")
    data = load_retrieval(tmp_path)
    assert (data.queries, data.doc_ids, data.qrels) == (["query 0"], ["d0"], {"q0": {"d0": 1}})


@pytest.mark.parametrize("headed", [True, False])
@pytest.mark.parametrize(
    "layout", ["plain", "crlf", "quoted", "blank", "decimal", "gzip", "bom", "trec", "trec spaces", "csv"]
)
def test_layouts_of_qrels(tmp_path, layout, headed):
    if layout == "csv" and not headed:
        pytest.skip("a CSV file has a header")
    folder = write_beir(tmp_path / "set")
    path = folder / "qrels" / "train.tsv"
    path.unlink()
    rows = [["q0", "d0", "1"], ["q1", "d2", "0"], ["q1", "d3", "2"]]
    header = ["query-id", "corpus-id", "score"]
    if layout == "decimal":
        rows = [[*row[:2], row[2] + ".0"] for row in rows]
    if layout.startswith("trec"):
        rows, header = [[row[0], "0", *row[1:]] for row in rows], ["query-id", "iteration", *header[1:]]
    if layout == "quoted":
        rows, header = ([[f'"{cell}"' for cell in row] for row in table] for table in (rows, [header]))
        header = header[0]
    mark = {"trec spaces": " ", "csv": ","}.get(layout, "\t")
    lines = [mark.join(row) for row in ([header] * headed + rows)]
    end = "\r\n" if layout == "crlf" else "\n"
    text = (BOM if layout == "bom" else "") + ("\n \n" if layout == "blank" else "") + end.join(lines) + end
    name = {"gzip": "train.tsv.gz", "trec": "train.txt", "csv": "train.csv"}.get(layout, "train.tsv")
    data = text.encode()
    (folder / "qrels" / name).write_bytes(gzip.compress(data) if layout == "gzip" else data)
    assert load_retrieval(folder, "train").qrels == {"q0": {"d0": 1}, "q1": {"d2": 0, "d3": 2}}


def test_the_header_of_qrels_names_their_columns(tmp_path):
    folder = write_beir(tmp_path / "set")
    (folder / "qrels" / "test.tsv").write_text("corpus-id\tscore\tquery-id\nd1\t2\tq0\n")
    assert load_retrieval(folder).qrels == {"q0": {"d1": 2}}


def test_other_kinds_of_the_same_qrels_and_what_reranking_has_are_named(tmp_path):
    folder = write_beir(tmp_path / "set", qrels={"test": [("q0", "d1", 2)]})
    row = {"query-id": "q0", "corpus-id": "d2", "score": 1}
    write_jsonl(folder / "qrels" / "test.jsonl", [row | {"iteration": 3}])
    write_jsonl(folder / "top_ranked.jsonl", [{"query-id": "q0", "corpus-ids": ["d1"]}])
    with pytest.warns(UserWarning, match=r"not read: 'qrels/test\.jsonl', 'top_ranked\.jsonl'"):
        assert load_retrieval(folder).qrels == {"q0": {"d1": 2}}
    (folder / "qrels" / "test.tsv").unlink()
    with pytest.warns(UserWarning, match=r"test\.jsonl: not read: 'iteration'\. What is read: query-id"):
        assert load_retrieval(folder).qrels == {"q0": {"d2": 1}}


def test_a_judged_document_that_is_in_no_corpus_counts_as_never_found(tmp_path):
    rows = [("q0", "d0", 1), ("q0", "dx", 1), ("q1", "dy", 1), ("q1", "d1", 0), ("q2", "d2", 1)]
    folder = write_beir(tmp_path / "set", qrels={"test": rows})
    with pytest.warns(
        UserWarning, match=r"^2 of 5 judged documents are not in .*corpus\.jsonl .*line 3: 'dx'\): they count as never"
    ):
        data = load_retrieval(folder)
    assert data.qrels == {"q0": {"d0": 1, "dx": 1}, "q1": {"dy": 1, "d1": 0}, "q2": {"d2": 1}}
    with pytest.warns(UserWarning, match="left out in training"):
        examples = open_examples(folder, split="test")
    assert [parts(e) for e in examples] == [("query 0", ["text 0"], []), ("query 2", ["text 2"], [])]


def test_of_two_grades_for_a_pair_the_last_counts(tmp_path):
    folder = write_beir(
        tmp_path / "set", qrels={"test": [("q0", "d0", 1), ("q0", "d0", 2), ("q1", "d1", 1), ("q1", "d1", 1)]}
    )
    with pytest.warns(
        UserWarning, match=r"^1 pairs are judged twice .* of which the last counts \(.*test\.tsv, line 3: 1, then 2\)"
    ):
        assert load_retrieval(folder).qrels == {"q0": {"d0": 2}, "q1": {"d1": 1}}


@pytest.mark.parametrize("score", ["1" * 20, "-" + "9" * 20, "1e5", "nan", "inf", "0.5", "1_0", "١", "", "0x1"])
def test_scores_that_are_none(tmp_path, score):
    folder = write_beir(tmp_path / "set", qrels={"test": [("q0", "d0", 1), ("q1", "d1", score)]})
    with pytest.raises(
        ValueError, match=r"test\.tsv, line 3: expected query-id, corpus-id and an integer score"
    ) as error:
        load_retrieval(folder)
    one_line(error)


def test_a_truncated_gzip_file_is_named(tmp_path):
    folder = write_beir(tmp_path / "set", gz=".gz")
    path = folder / "qrels" / "train.tsv"
    packed = gzip.compress(path.read_bytes())
    path.unlink()
    path.with_name("train.tsv.gz").write_bytes(packed[:-9])
    with pytest.raises(ValueError, match=r"train\.tsv\.gz is not a whole gzip file") as error:
        load_retrieval(folder, "train")
    one_line(error)


def ms_marco(folder: Path) -> Path:
    folder.mkdir()
    passages = [f'{i}\t"The" passage {i}\n' for i in range(4)]
    (folder / "collection.tsv").write_text("".join(passages))
    (folder / "queries.train.tsv").write_text("10\tquery ten\n11\tquery eleven\n")
    (folder / "queries.dev.small.tsv").write_text("20\tquery twenty\n")
    (folder / "qrels.train.tsv").write_text("10\t0\t1\t1\n11\t0\t2\t1\n")
    (folder / "qrels.dev.small.tsv").write_text("20\t0\t3\t1\n")
    (folder / "triples.train.small.tsv").write_text("query ten\tgood one\tbad one\n" * 2)
    (folder / "qidpidtriples.train.full.2.tsv").write_text("10\t1\t3\n11\t2\t0\n")
    return folder


def test_ms_marco(tmp_path):
    folder = ms_marco(tmp_path / "msmarco")
    assert len(open_mining_set(folder).documents) == 4  # the corpus, not what is judged of it
    examples = open_examples(folder)
    assert [parts(e)[:2] for e in examples] == [
        ("query ten", ['"The" passage 1']),
        ("query eleven", ['"The" passage 2']),
    ]
    assert load_retrieval(folder, "dev.small").qrels == {"20": {"3": 1}}
    assert parts(open_examples(folder / "triples.train.small.tsv")[1]) == ("query ten", ["good one"], ["bad one"])
    by_id = open_examples(folder / "qidpidtriples.train.full.2.tsv")
    assert [parts(e) for e in by_id] == [
        ("query ten", ['"The" passage 1'], ['"The" passage 3']),
        ("query eleven", ['"The" passage 2'], ['"The" passage 0']),
    ]
    (folder / "queries.train.tsv").rename(tmp_path / "queries.train.tsv")
    with pytest.raises(ValueError, match=r"2\.tsv, line 1: the query '10' has no text, and is in no queries beside"):
        open_examples(folder / "qidpidtriples.train.full.2.tsv")
    assert list(open_corpus(tmp_path / "queries.train.tsv")) == [
        Passage("query ten", "", "10"),
        Passage("query eleven", "", "11"),
    ]


# ------------------------------------------------------------------------------------------------------------- corpora


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "csv", "tsv", "tsv.gz", "parquet"])
@pytest.mark.parametrize(
    "names", [("_id", "title", "text"), ("docid", "title", "contents"), ("id", "Title", "passage")]
)
def test_corpora_of_every_kind(tmp_path, suffix, names):
    records = [dict(zip(names, (f"d{i}", "T" if i else "", f"text {i}"), strict=True)) for i in range(3)]
    path = tmp_path / f"corpus.{suffix}"
    if suffix.startswith("jsonl"):
        write_jsonl(path, records)
    else:
        write_table(path, records)
    for source in (path, tmp_path):
        documents = open_corpus(source)
        assert list(documents.ids()) == ["d0", "d1", "d2"]
        assert list(documents.texts) == ["text 0", "T text 1", "T text 2"]
        assert documents.find("d2") == Passage("text 2", "T", "d2")


def test_a_corpus_without_ids_or_of_other_names(tmp_path):
    path = write_table(tmp_path / "a.csv", [{"nr": "1", "body text": "t"}])
    with pytest.raises(ValueError, match=r"a\.csv: no cell of the first line names a known column"):
        open_corpus(path)
    assert list(open_corpus(path, columns={"id": "nr", "text": "body text"})) == [Passage("t", "", "1")]
    with pytest.raises(ValueError, match="columns has the unknown field 'query'"):
        open_corpus(path, columns={"query": "nr"})
    text = write_jsonl(tmp_path / "a.jsonl", [{"text": "t"}, {"text": "u"}])
    documents = open_corpus(text, needs_ids=False)
    assert (documents.has_ids, list(documents.texts)) == (False, ["t", "u"])
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: expected an id"):
        open_corpus(text)
    (tmp_path / "a.txt").write_text(f"{BOM}one\r\n\r\ntwo\n", newline="")
    assert list(open_corpus(tmp_path / "a.txt", needs_ids=False).texts) == ["one", "two"]
    mixed = write_jsonl(tmp_path / "b.jsonl", [{"id": 1, "text": "t"}, {"text": "u"}])
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2: expected an id"):
        open_corpus(mixed, needs_ids=False)
    write_jsonl(mixed, [{"text": "u"}, {"id": 1, "text": "t"}])
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2: the record has an id, and the first has none"):
        open_corpus(mixed, needs_ids=False)
