"""The quick look at plain records finds what the careful one finds: the same examples, complaints and notices."""

import json
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from inbatch.data import lines, open_examples, readers
from inbatch.data.identity import apart, without_positives
from inbatch.data.lines import Lines, json_value
from inbatch.data.records import Passage

TEXTS = st.sampled_from(
    ["a", "b", "a  b", "a b", " a", "a ", "", " ", "\u00e9", "e\u0301", "e\u0301 b", "\u2003a", "a\nb", "\ud800"]
)
LEAVES = st.one_of(TEXTS, st.none(), st.integers(0, 1), st.booleans())
OBJECTS = st.fixed_dictionaries(
    {}, optional={"text": LEAVES, "title": LEAVES, "id": LEAVES, "role": TEXTS, "content": TEXTS}
)
COLUMNS = st.one_of(
    TEXTS, st.lists(TEXTS, max_size=3), LEAVES, st.lists(st.one_of(LEAVES, OBJECTS), max_size=2), OBJECTS
)
NAMES = ["query", "question", "pos", "positive_1", "neg", "hard_negative", "query_id", "prompt", "corpus_id", "score"]
PLAIN = st.fixed_dictionaries(
    {"query": st.just("a b"), "pos": st.lists(TEXTS.filter(str.strip), min_size=1, max_size=2)},
    optional={"neg": st.lists(TEXTS, max_size=2)},
)
ODD = st.one_of(
    st.builds(lambda record, name, value: record | {name: value}, PLAIN, st.sampled_from(NAMES), COLUMNS),
    st.builds(lambda record: {"question": record.pop("query"), **record}, PLAIN),
    st.dictionaries(st.sampled_from(NAMES), COLUMNS, max_size=4),
)
BROKEN = st.sampled_from(
    [
        "",
        " ",
        "{",
        '"a"',
        "[1",
        "2]",
        "{} {}",
        '{"query": "a", "query": "b", "pos": "c"}',
        '{"query": "a"',
        '"pos": "b"}',
    ]
)
ENDS = st.sampled_from(["\n", "\r\n", " \n", "\n\n", "\n\ufeff", "\n "])
GIVEN = st.sampled_from(
    [None, {"query": "question"}, {"positive": "pos"}, {"negative": ["neg", "hard_negative"]}, {"negative": "score"}]
)


@st.composite
def contents(draw) -> str:
    """Good records and an odd one or two, now and then a broken line."""
    records = draw(st.lists(PLAIN, max_size=3)) + draw(st.lists(ODD, max_size=2))
    some = [json.dumps(record) for record in draw(st.permutations(records))]
    if draw(st.integers(0, 4)) == 0:
        some.insert(draw(st.integers(0, len(some))), draw(BROKEN))
    return "".join(line + draw(ENDS) for line in some) or "{}"


def opened(path: Path, columns) -> tuple:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            examples = open_examples(path, columns=columns)
        except ValueError as error:
            return "refused", str(error)
    source = examples.sources[0]
    assert source.columns is not None
    return (
        list(examples),
        [str(warning.message) for warning in said],
        source.id_texts.tolist(),
        dict(examples.same),
        source.columns.roles,
        source.columns.all_unread(),
    )


@settings(max_examples=300, deadline=None)
@given(contents(), GIVEN)
@example('{"query": "a", "pos": "b", "corpus_id": true}\n', None)
def test_the_quick_way_finds_what_the_careful_way_finds(content, columns):
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        path = Path(folder) / "a.jsonl"
        path.write_text(content)
        quick = opened(path, columns)
        monkeypatch.setattr(readers, "_plain", lambda record, columns: None)
        monkeypatch.setattr(lines, "_json_lines", lambda block: iter(()))
        assert opened(path, columns) == quick


def test_plain_records_are_made_into_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"query": "a", "pos": ["b"], "neg": ["c", "d"]}\n' * 3 + '{"query": "a", "pos": "b", "query_id": 1}\n'
    )
    careful = []
    real = readers._example
    monkeypatch.setattr(readers, "_example", lambda record, *rest: careful.append(record) or real(record, *rest))
    open_examples(path)
    assert [record.get("query_id") for record in careful] == [1]


def test_lines_are_read_the_quick_way_up_to_one_that_differs():
    block = b'{"a": 1}\n[2]\r\n"x" \n\n{"b": 2}'
    assert list(lines._json_lines(block)) == [{"a": 1}, [2], "x"]
    assert list(lines._json_lines(b'{"a":\n1}\n{"b": 1}')) == []
    assert list(lines._json_lines(b'1\n{"a": "\\ud83d"}\n2')) == [1]
    assert list(lines._json_lines(b"1\n\xff\n2")) == []


def test_through_equals_one_by_one(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"a": "{"é" * i}"}}\n' + "\n" * (i % 3 == 0) + " " * (i % 5 == 0) for i in range(200)))
    monkeypatch.setattr(lines, "_BLOCK_BYTES", 1000)
    rows = Lines(path)
    assert (
        list(rows.through(range(7, 190))) == [rows[i] for i in range(7, 190)] == [{"a": "é" * i} for i in range(7, 190)]
    )
    assert rows._parse is json_value


@given(st.lists(TEXTS.filter(str.strip), min_size=1, max_size=3), st.lists(TEXTS.filter(str.strip), max_size=3))
def test_apart_says_what_without_positives_does(positives, negatives):
    kept = without_positives([Passage(text) for text in positives], [Passage(text) for text in negatives])
    assert apart(positives, negatives) == (len(kept) == len(negatives))
