"""Damaged files of every kind: a correct parse, or one line of ValueError that names the file; in bounded memory."""

import gzip
import json
import os
import random
import signal
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inbatch.data import load_retrieval, open_corpus, open_examples
from tests.data.test_formats import CORPUS, DPR, TEVATRON, ms_marco
from tests.data_files import write_beir, write_corpus_id, write_jsonl

FILES = int(os.environ.get("INBATCH_TEST_MUTATIONS", "10000"))
MIB = 1 << 20

RECORDS = [
    {
        "query": f"q{i} é",
        "pos": ["p", {"text": "t", "title": "T", "id": i}],
        "neg": "n",
        "prompt": "x ",
        "corpus_id": "w",
    }
    for i in range(4)
]
# What breaks parsers: brackets, quotes, escapes, numbers, marks, halves of characters, long runs.
PIECES = [
    b"[", b"]", b"{", b"}", b'"', b"\\", b"\\ud83d", b"\\u0000", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80",
    b"\r", b"\n", b"\t", b",", b";", b":", b" ", b"null", b"true", b"-1", b"1e999", b"NaN", b"Infinity",
    b"9" * 30, b"9" * 5000, b"0.5",
    b"[" * 3000, b'{"a":' * 3000, b'"' * 50, b"\\" * 51, b"\t" * 9, b"{}", b"[]", b'""', b'"id"', b'"text"',
    b'"query"', b'"pos"',
    "\u2028".encode(), "\U0001f600".encode(),
]  # fmt: skip


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return the bytes with one to four changes: flipped, cut, inserted, repeated, exchanged, or cut off."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(data) + 1)
        stop = min(len(data), start + rng.choice([1, 1, 2, 8, 64, 4096]))
        kind = rng.randrange(6)
        if kind == 0 and start < len(data):
            data[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[start:stop]
        elif kind == 2:
            data[start:start] = rng.choice(PIECES)
        elif kind == 3:
            data[start:start] = data[start:stop] * rng.randint(1, 3)
        elif kind == 4:
            data[start:stop] = rng.choice(PIECES)
        elif rng.random() < 0.3:
            del data[start:]
    return bytes(data)


def inline(name: str) -> Callable[[Path], tuple[Path, Callable]]:
    """Make a file of records, and say how it is opened."""

    def make(folder: Path) -> tuple[Path, Callable]:
        path = folder / name
        if name.endswith((".jsonl", ".jsonl.gz")) or name == "lines.json":
            write_jsonl(path, RECORDS)
        elif name.endswith(".json"):
            path.write_text(json.dumps([DPR] * 3 if "list" in name else {"data": RECORDS}, indent=1))
        elif name.endswith(".parquet"):
            rows = [{"query": f"q{i}", "pos": ["p", "r"], "neg": None, "query_id": i} for i in range(20)]
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            mark = "," if name.endswith(".csv") else "\t"
            rows = [["query", "positive", "negative"], ["a", '"p ""x"""', '"two\nlines"'], ["b", "r", ""]]
            path.write_text("\n".join(mark.join(row) for row in rows))
        return path, lambda: open_examples(path)

    return make


def judged(part: str) -> Callable[[Path], tuple[Path, Callable]]:
    def make(folder: Path) -> tuple[Path, Callable]:
        write_beir(folder / "set", gz=".gz" if part.endswith(".gz") else "")
        if part.endswith("train.jsonl"):
            (folder / "set" / "qrels" / "train.tsv").unlink()
            write_jsonl(folder / "set" / part, [{"query-id": "q0", "corpus-id": "d1", "score": 1}] * 2)
        return folder / "set" / part, lambda: (load_retrieval(folder / "set", "train"), open_examples(folder / "set"))

    return make


def nemo(part: str) -> Callable[[Path], tuple[Path, Callable]]:
    def make(folder: Path) -> tuple[Path, Callable]:
        path = write_corpus_id(folder, kind="jsonl")
        return folder / part, lambda: open_examples(path)

    return make


def tevatron(part: str) -> Callable[[Path], tuple[Path, Callable]]:
    def make(folder: Path) -> tuple[Path, Callable]:
        write_jsonl(folder / "train.jsonl", [TEVATRON] * 3)
        write_jsonl(folder / "corpus.jsonl", CORPUS)
        return folder / part, lambda: open_examples(folder / "train.jsonl")

    return make


def marco(part: str) -> Callable[[Path], tuple[Path, Callable]]:
    def make(folder: Path) -> tuple[Path, Callable]:
        ms_marco(folder / "ms")
        source = folder / "ms" / (part if "triples" in part else ".")
        return folder / "ms" / part, lambda: open_examples(source)

    return make


def corpus(name: str) -> Callable[[Path], tuple[Path, Callable]]:
    def make(folder: Path) -> tuple[Path, Callable]:
        path = folder / name
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist([{"id": i, "text": "t", "title": None} for i in range(9)]), path)
        elif name.endswith(".jsonl"):
            write_jsonl(path, CORPUS)
        else:
            mark = "," if name.endswith(".csv") else "\t"
            path.write_text("".join(f"{row}\n" for row in (f"id{mark}text", f'1{mark}"a"', f"2{mark}b")))
        return path, lambda: open_corpus(path, needs_ids=False)

    return make


READERS = {
    **{f"inline {name}": inline(name) for name in (
        "a.jsonl", "a.jsonl.gz", "lines.json", "list.json", "object.json", "a.parquet", "a.csv", "a.tsv"
    )},
    **{f"judged {part}": judged(part) for part in (
        "corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "qrels/train.jsonl", "corpus.jsonl.gz"
    )},
    **{f"nemo {part}": nemo(part) for part in ("train.json", "corpus/docs.jsonl", "corpus/merlin_metadata.json")},
    **{f"tevatron {part}": tevatron(part) for part in ("train.jsonl", "corpus.jsonl")},
    **{f"ms marco {part}": marco(part) for part in (
        "collection.tsv", "queries.train.tsv", "qrels.train.tsv", "triples.train.small.tsv",
        "qidpidtriples.train.full.2.tsv",
    )},
    **{f"corpus {name}": corpus(name) for name in ("c.jsonl", "c.csv", "c.tsv", "c.txt", "c.parquet")},
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_damaged_files(tmp_path, name):
    path, opened = READERS[name](tmp_path)
    whole = path.read_bytes()
    packed = path.suffix == ".gz"
    rng = random.Random(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened()
        for number in range(-(-FILES // len(READERS))):
            # Half of the packed files are damaged inside, where only the reader of what they hold sees it.
            inside = packed and number % 2
            data = gzip.compress(mutated(gzip.decompress(whole), rng), 1) if inside else mutated(whole, rng)
            path.write_bytes(data)
            try:
                opened()
            except ValueError as error:
                message = str(error)
                assert "\n" not in message, (number, message)
                assert str(tmp_path) in message, (number, message)
                assert len(message) < 3000, (number, message[:3000])


LONG = 1 << 18
HOSTILE = {
    "deep.jsonl": b"[" * LONG,
    "deep.json": b"[" * LONG,
    "deep object.json": b'{"a":' * (LONG // 5),
    "deep value.json": b'[{"query": ' + b"[" * LONG + b"]" * LONG + b"}]",
    "quotes.json": b"[" + b'"' * LONG,
    "strings.json": b'[{"query":' + b'"",' * (LONG // 3),
    "backslashes.json": b'["' + b"\\" * LONG,
    "backslashes in a key.json": b'{"' + b"\\" * LONG + b'": [], "data": [{}]}',
    "objects.json": b"[" + b"{}," * (LONG // 3),
    "commas.json": b"[" + b"," * LONG,
    "quotes.jsonl": b'"' * LONG,
    "keys.jsonl": b"{" + b",".join(b'"%d":1' % i for i in range(LONG // 10)) + b"}",
    "quotes.csv": b"query,positive\n" + b'"' * (LONG + 1),
    "lines of a quote.csv": b"query,positive\n" + b'"\n' * (LONG // 8),
    "one quote.csv": b'query,positive\n"' + b"a,b\n" * (LONG // 4),
    "commas.csv": b"," * LONG,
    "tabs.tsv": b"\t" * LONG,
    "columns.csv": b",".join(b"column %d" % i for i in range(LONG // 10)) + b"\na",
    "blank lines.jsonl": b"\n" * (LONG // 4),
    "short lines.jsonl": b"1\n" * (LONG * 3),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_take_neither_time_nor_memory(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(HOSTILE[name])
    tracemalloc.start()
    with time_limit(300), pytest.raises(ValueError, match=r"[a-z]") as error:
        open_examples(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
    assert peak < 2 * path.stat().st_size + 12 * MIB


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """End what hangs: many times what it takes on a busy machine."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"still at work after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


ALIKE = {
    "plain": lambda data: data,
    "CRLF": lambda data: data.replace(b"\n", b"\r\n"),
    "a byte-order mark": lambda data: b"\xef\xbb\xbf" + data,
    "blank lines": lambda data: b"\n \n\n" + data.replace(b"\n", b"\n\n"),
    "no last line break": lambda data: data.rstrip(b"\n"),
}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20), min_size=2),
    kind=st.sampled_from(["jsonl", "csv", "tsv"]),
    packed=st.booleans(),
)
def test_layouts_that_mean_the_same_are_read_alike(tmp_path, texts, kind, packed):
    texts = [text for text in texts if text.strip()] or ["text"]
    if kind == "jsonl":
        lines = [json.dumps({"query": f"q{i}", "positive": text}, ensure_ascii=False) for i, text in enumerate(texts)]
    else:
        mark = {"csv": ",", "tsv": "\t"}[kind]
        rows = [(f"q{i}", text) for i, text in enumerate(texts)]
        cells = [(text.replace('"', '""') for text in pair) for pair in (("query", "positive"), *rows)]
        lines = [mark.join(f'"{cell}"' for cell in row) for row in cells]
    for change in ALIKE.values():
        data = change("".join(f"{line}\n" for line in lines).encode())
        path = tmp_path / f"a.{kind}{'.gz' * packed}"
        path.write_bytes(gzip.compress(data, 1) if packed else data)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            examples = open_examples(path)
        assert [e.query for e in examples] == [f"q{i}" for i in range(len(texts))]
        assert [e.positives[0].text for e in examples] == texts
