"""What is kept of data files: made once, used while they are the same, never when it is stale or broken."""

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inbatch.data import index, load_retrieval, open_corpus, open_examples
from inbatch.data.index import HEADER, arrays_made_once, made_once, spread
from inbatch.data.lines import Lines, joined
from tests.data_files import one_line, write_beir, write_corpus_id, write_jsonl

RECORDS = [{"query": f"q{i}", "pos": [f"p{i}"], "neg": ["n"]} for i in range(300)]


@pytest.fixture(autouse=True)
def keep_all(monkeypatch):
    """Small files are kept too, and passes cut into many parts."""
    monkeypatch.delenv("INBATCH_CACHE", raising=False)
    monkeypatch.setattr(index, "_SMALL", 0)
    monkeypatch.setattr(index, "_PART_BYTES", 1 << 10)


def kept(folder: Path) -> list[Path]:
    names = [".gitignore", "*.lock"]
    return sorted(file for file in folder.iterdir() if not any(file.match(name) for name in names))


def change_unseen(path: Path) -> None:
    """Breaks a record in the middle of a large file, of the same size and time: only reading all of it shows that."""
    state = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x80
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def large(path: Path) -> Path:
    return write_jsonl(path, [record | {"pos": ["p" * 2000]} for record in RECORDS])


def test_a_file_is_parsed_once_and_found_again(tmp_path):
    path = large(tmp_path / "a.jsonl")
    first = open_examples(path)
    files = kept(tmp_path / ".inbatch")
    times = [file.stat().st_mtime_ns for file in files]
    assert len(files) == 2  # lines; that all records can be parsed
    change_unseen(path)
    second = open_examples(path)
    assert [second[i] for i in (0, 17, 299)] == [first[i] for i in (0, 17, 299)]
    assert [file.stat().st_mtime_ns for file in kept(tmp_path / ".inbatch")] == times
    assert (tmp_path / ".inbatch" / ".gitignore").read_text() == "*\n"


def test_arrays_are_aligned_whatever_lies_before_them(tmp_path):
    """A search in an array that is not aligned copies the whole of it."""
    made = {"ids": np.arange(3, dtype=np.uint8), "none": np.empty(0, np.int64), "keys": np.arange(9)[::3]}
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    for files in ([path], []):
        found = arrays_made_once(files, "test", None, lambda: made)
        assert {name: array.tolist() for name, array in found.items()} == {
            "ids": [0, 1, 2],
            "none": [],
            "keys": [0, 3, 6],
        }
        assert all(array.flags.aligned for array in found.values())


def touch(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def write_over(place: int):
    def change(path: Path) -> None:
        state = path.stat()
        data = bytearray(path.read_bytes())
        data[place] ^= 0x80
        path.write_bytes(data)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))

    return change


@pytest.mark.parametrize("change", [touch, write_over(9000), write_over(-9000)], ids=["time", "head", "tail"])
def test_a_changed_file_is_read_again(tmp_path, change):
    path = large(tmp_path / "a.jsonl")
    open_examples(path)
    before = kept(tmp_path / ".inbatch")
    if change is touch:
        change_unseen(path)
    change(path)
    with pytest.raises(ValueError, match="is not JSON"):
        open_examples(path)
    assert kept(tmp_path / ".inbatch") == before  # the same names: nothing stale piles up


def test_a_longer_file_is_read_again(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    assert len(open_examples(path)) == 300
    with path.open("a") as file:
        file.write(json.dumps({"query": "new", "pos": "p"}))
    examples = open_examples(path)
    assert len(examples) == 301
    assert examples[300].query == "new"


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def cut_to_header(file: Path) -> None:
    os.truncate(file, HEADER)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def overwrite(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, cut_to_header, empty, overwrite])
def test_a_broken_index_is_made_anew(tmp_path, damage):
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    expected = open_examples(path)[:]
    for file in kept(tmp_path / ".inbatch"):
        damage(file)
    assert open_examples(path)[:] == expected
    change_time = [file.stat().st_mtime_ns for file in kept(tmp_path / ".inbatch")]
    assert open_examples(path)[:] == expected
    assert [file.stat().st_mtime_ns for file in kept(tmp_path / ".inbatch")] == change_time


def test_other_settings_are_another_index(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [record | {"other": "x"} for record in RECORDS[:-1]] + RECORDS[-1:])
    open_examples(path, columns={"query": "query"})
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"line 300: the record lacks .other., which columns names for the positive"
        ):
            open_examples(path, columns={"positive": "other"})
    assert len(open_examples(path)) == 300


def test_what_is_wrong_is_kept_too_until_the_file_is_mended(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [*RECORDS, {"query": "q"}, "{", *RECORDS])
    messages = []
    for _ in range(2):
        with pytest.raises(ValueError, match=r"a\.jsonl, line 301: the record has no positive") as error:
            open_examples(path)
        messages.append(one_line(error))
    assert messages[0] == messages[1]
    write_jsonl(path, RECORDS)
    assert len(open_examples(path)) == 300


def test_where_it_is_kept(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "data" / "a.jsonl", RECORDS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    (path.parent / ".inbatch").write_text("no folder")  # as good as a folder that cannot be written to
    open_examples(path)
    assert len(kept(tmp_path / "user" / "inbatch")) == 2
    monkeypatch.setenv("INBATCH_CACHE", str(tmp_path / "given"))
    open_examples(path)
    assert len(kept(tmp_path / "given")) == 2
    (path.parent / "b").mkdir()
    open_examples(write_jsonl(path.parent / "b" / "a.jsonl", RECORDS[:7]))  # the same name in another folder
    assert len(kept(tmp_path / "given")) == 4
    assert len(open_examples(path)) == 300
    monkeypatch.setenv("INBATCH_CACHE", str(path))
    with pytest.raises(ValueError, match=r"INBATCH_CACHE is .*not a writable folder") as error:
        open_examples(path)
    one_line(error)


def test_a_moved_folder_keeps_its_index(tmp_path):
    path = large(tmp_path / "a" / "a.jsonl")
    open_examples(path)
    (tmp_path / "a").rename(tmp_path / "b")
    change_unseen(tmp_path / "b" / "a.jsonl")
    assert len(open_examples(tmp_path / "b" / "a.jsonl")) == 300


def test_small_files_are_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "_SMALL", 1 << 20)
    open_examples(write_jsonl(tmp_path / "a.jsonl", RECORDS))
    assert not (tmp_path / ".inbatch").exists()


def _make_once(rank: int, path: str, log: str) -> list[int]:
    def make():
        with open(log, "a") as file:
            file.write("made\n")
        return {"a": np.arange(5), "none": np.empty((0, 3))}

    with pytest.MonkeyPatch.context() as patch:  # the process runs other tests after this one
        patch.setattr(index, "_SMALL", 0)
        arrays = arrays_made_once([Path(path)], "test", None, make)
    assert arrays["none"].shape == (0, 3)
    return arrays["a"].tolist()


def test_one_of_several_processes_makes_it(tmp_path, pool):
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    assert pool.run(_make_once, 4, str(path), str(tmp_path / "log")) == [[0, 1, 2, 3, 4]] * 4
    assert (tmp_path / "log").read_text() == "made\n"


def test_a_process_killed_while_making_leaves_no_trace(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    code = f"""
import os, pathlib, signal
from inbatch.data import index
index._SMALL = 0
def make(file):
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
index.made_once([pathlib.Path({str(path)!r})], "test", None, make)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    with made_once([path], "test", None, lambda file: file.write(b"whole") and None) as file:
        assert os.pread(file.fileno(), 99, HEADER) == b"whole"


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    with pytest.raises(ValueError, match="changed while it was read"):
        made_once([path], "test", None, lambda file: touch(path))
    assert not kept(tmp_path / ".inbatch")


def test_a_full_disk_costs_the_index_alone(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    calls = []

    def make(file):
        calls.append(1)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        file.write(b"whole")

    with made_once([path], "test", None, make) as file:
        assert os.pread(file.fileno(), 99, HEADER) == b"whole"
    assert "cannot be kept (No space left on device)" in capsys.readouterr().err
    assert not kept(tmp_path / ".inbatch")


def test_spread_keeps_the_order_and_raises_the_first_error():
    assert [row for rows in spread(list, 1000, 1 << 20) for row in rows] == list(range(1000))

    def fail(rows: range) -> None:
        if rows.start >= 500:
            raise ValueError(f"row {rows.start}")

    with pytest.raises(ValueError, match=r"^row 500$"):
        spread(fail, 1000, 1 << 20)


# ------------------------------------------------------------------------------------------------- every kind of source


def test_gzip_is_unpacked_once(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl.gz", RECORDS)
    expected = open_examples(path)[:]
    assert expected[7].query == "q7"
    assert open_examples(path).where(7) == f"{path}, line 8"
    assert open_examples(path)[:] == expected
    path.write_bytes(gzip.compress(b'{"query": "new", "pos": "p"}'))
    assert open_examples(path)[0].query == "new"


def test_parquet_is_unpacked_once(tmp_path, monkeypatch):
    monkeypatch.setattr("inbatch.data.parquet._BATCH_ROWS", 64)
    rows = [
        {"anchor": f"q{i}", "positive": f"p{i}", "negative": None if i % 3 else "n", "no": b"\xff"} for i in range(300)
    ]
    table = pa.Table.from_pylist(rows)
    coded = table.column("negative").dictionary_encode()
    pq.write_table(table.set_column(2, "negative", coded), tmp_path / "a.parquet", row_group_size=50)
    for _ in range(2):
        examples = open_examples(tmp_path / "a.parquet")
        assert [(e.query, e.positives[0].text, len(e.negatives)) for e in examples] == [
            (f"q{i}", f"p{i}", int(i % 3 == 0)) for i in range(300)
        ]
        assert examples.where(299).endswith("a.parquet, row 300")
    assert len(kept(tmp_path / ".inbatch")) == 2


def test_beir_and_corpus_id(tmp_path):
    corpus = [{"_id": f"d{i}", "text": f"text {i % 200}"} for i in range(300)]
    folder = write_beir(tmp_path / "set", corpus=corpus)
    before = load_retrieval(folder, "train"), open_examples(folder)[:]
    assert before[0].doc_ids == [f"d{i}" for i in range(300)]
    after = load_retrieval(folder, "train"), open_examples(folder)[:]
    assert after[1] == before[1]
    assert (after[0].doc_ids, list(after[0].documents)) == (before[0].doc_ids, list(before[0].documents))
    documents = open_corpus(folder / "corpus.jsonl")
    assert [documents.row(f"d{i}") for i in range(300)] == list(range(300))
    assert documents[250].doc_id == "d250"
    assert documents.row("d300") is None

    path = write_corpus_id(tmp_path / "nemo")
    assert open_examples(path)[:] == open_examples(path)[:]
    pq.write_table(
        pa.Table.from_pylist([{"id": i, "text": f"new {i}"} for i in range(5)]),
        path.parent / "corpus" / "train.parquet",
    )
    assert open_examples(path)[0].positives[0].text == "new 1"
    pq.write_table(
        pa.Table.from_pylist([{"id": i, "text": f"new {i}"} for i in range(1)]),
        path.parent / "corpus" / "train.parquet",
    )
    with pytest.raises(ValueError, match="pos_doc names the document 1"):
        open_examples(path)


def test_joined_rows_read_through_all_parts(tmp_path):
    parts = [Lines(write_jsonl(tmp_path / f"{n}.jsonl", [[n, i] for i in range(n)])) for n in (3, 0, 1, 5)]
    rows = joined(parts)
    expected = [[n, i] for n in (3, 0, 1, 5) for i in range(n)]
    assert list(rows) == rows[:] == expected
    assert rows[::-2] == expected[::-2]
    assert list(rows.through(range(2, 6))) == expected[2:6]
    assert rows.where(4) == f"{tmp_path / '5.jsonl'}, line 1"
    assert rows.files == [part.path for part in parts]


def test_a_folder_that_nobody_may_write_to_stays_as_it_was(tmp_path, monkeypatch):
    monkeypatch.delenv("INBATCH_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("inbatch.data.index._SMALL", 0)
    (tmp_path / "data").mkdir()
    path = write_jsonl(tmp_path / "data" / "a.jsonl", [{"query": "q", "pos": "p"}])
    (tmp_path / "data").chmod(0o555)
    try:
        assert len(open_examples(path)) == 1
        assert [file.name for file in (tmp_path / "data").iterdir()] == ["a.jsonl"]  # as root, too
        assert any((tmp_path / "cache" / "inbatch").iterdir())
    finally:
        (tmp_path / "data").chmod(0o755)
