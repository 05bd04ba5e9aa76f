"""Folders are whole or absent, whatever happens while they are written."""

import subprocess
import sys

import pytest
import torch

from inbatch import checkpoint
from tests.helpers import REPOSITORY


def _save(folder, step, keep_last=2, value=1.0):
    def save_model(path: str) -> None:
        import pathlib

        pathlib.Path(path).mkdir()
        (pathlib.Path(path) / "weights").write_text(str(value))

    state = {"optimizer": {"state": {0: torch.tensor([value])}, "lr": 0.5}}
    return checkpoint.save(folder, step, save_model=save_model, state=state, keep_last=keep_last)


def test_saved_state_comes_back(tmp_path):
    path = _save(tmp_path, 7, value=3.0)
    state = checkpoint.load_state(path)
    assert state["step"] == 7
    assert state["optimizer"]["lr"] == 0.5
    assert torch.equal(state["optimizer"]["state"][0], torch.tensor([3.0]))
    assert (path / "model" / "weights").read_text() == "3.0"


def test_newest_are_kept_and_found(tmp_path):
    assert checkpoint.latest(tmp_path / "absent") is None
    for step in (5, 10, 15):
        _save(tmp_path, step)
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [10, 15]
    # Neither an interrupted write nor anything else in the folder counts.
    (tmp_path / ".step-00000020.partial").mkdir()
    (tmp_path / "step-20").mkdir()
    (tmp_path / "notes.txt").touch()
    found = checkpoint.latest(tmp_path)
    assert found == (15, tmp_path / "step-00000015")


def test_a_failed_write_leaves_the_old_folder(tmp_path):
    target = tmp_path / "model"
    checkpoint.write_folder(target, lambda path: (path / "a").write_text("old") and None)

    def fail(path):
        (path / "a").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_folder(target, fail)
    assert (target / "a").read_text() == "old"
    checkpoint.write_folder(target, lambda path: (path / "b").write_text("new") and None)
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_killed_while_writing_is_not_seen(tmp_path):
    code = (
        "import os, signal, sys; from inbatch import checkpoint\n"
        "def fill(path):\n"
        "    (path / 'half').write_text('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "checkpoint.write_folder(sys.argv[1] + '/step-00000009', fill)"
    )
    _save(tmp_path, 5)
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY, check=False)
    assert killed.returncode == -9
    assert (tmp_path / ".step-00000009.partial" / "half").exists()
    assert checkpoint.latest(tmp_path) == (5, tmp_path / "step-00000005")
    _save(tmp_path, 9)
    assert checkpoint.latest(tmp_path) == (9, tmp_path / "step-00000009")
    assert not (tmp_path / ".step-00000009.partial").exists()
