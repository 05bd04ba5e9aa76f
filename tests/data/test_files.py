"""Files and folders are whole or absent, whatever happens while they are written."""

import os

import pytest

from inbatch.data.files import check_output, claimed, partial, publish, remove, replacing, write_json, write_text


def _fill(path, name: str, text: str = "", error: Exception | None = None):
    with replacing(path) as filled:
        filled.mkdir()
        (filled / name).write_text(text)
        if error is not None:
            raise error


def test_a_failed_write_leaves_the_old_folder(tmp_path):
    target = tmp_path / "model"
    _fill(target, "a", "old")
    with pytest.raises(RuntimeError):
        _fill(target, "a", "half", RuntimeError())
    assert (target / "a").read_text() == "old"
    _fill(target, "b")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_files_are_replaced_and_folders_above_made(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_text(path, "old")
    write_json(path, {"a": 1})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert os.listdir(path.parent) == ["a.json"]


def test_a_file_takes_no_folders_place(tmp_path):
    (tmp_path / "folder" / "full").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match="folder"):
        write_text(tmp_path / "folder", "text")
    assert os.listdir(tmp_path) == ["folder"]
    remove(tmp_path / "folder")
    assert not os.listdir(tmp_path)


def test_a_file_that_cannot_be_written_is_known_before(tmp_path):
    check_output(tmp_path / "new" / "a.json")
    assert os.listdir(tmp_path / "new") == []
    source = tmp_path / "a.jsonl"
    source.touch()
    for path in (tmp_path, source / "a.json"):
        with pytest.raises(ValueError, match=f"{path} cannot be written"):
            check_output(path)
    with pytest.raises(ValueError, match="is read as the source, and would be replaced: name another file"):
        check_output(tmp_path / "new" / ".." / "a.jsonl", [tmp_path / "b.jsonl", source])


def test_two_runs_never_fill_one_file(tmp_path):
    path = tmp_path / "a.npy"
    with claimed(path) as file:
        file.write(b"one")
        file.flush()
        with pytest.raises(ValueError, match=r"a\.npy is being written by another run: wait for its end, or name"):
            claimed(path)
        publish(path)
        with claimed(path):  # the next one
            assert path.read_bytes() == b"one"
    with claimed(path) as file:
        assert partial(path).read_bytes() == b""


def test_a_full_disk_is_named(tmp_path):
    """/dev/full takes no byte. A library in Rust says so in its text alone."""

    def fill_the_disk():
        with replacing(tmp_path / "a.txt") as filled:
            filled.symlink_to("/dev/full")
            filled.write_text("x")

    with pytest.raises(OSError, match=r"No space left on device: '.*/a.txt'"):
        fill_the_disk()
    with pytest.raises(OSError, match=r"No space left on device: '.*/b'"):
        _fill(tmp_path / "b", "file", error=Exception("I/O error: No space left on device (os error 28)"))
    with pytest.raises(ValueError, match="ours"):
        _fill(tmp_path / "c", "file", error=ValueError("ours"))
    assert not os.listdir(tmp_path)
