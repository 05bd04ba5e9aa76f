"""Folders are whole or absent, whatever happens while they are written."""

import subprocess
import sys

import pytest
import torch

from inbatch.train import checkpoint
from tests.helpers import REPOSITORY


def _trained(steps: int):
    """A module with a frozen parameter and one that no batch uses, after so many steps."""
    torch.manual_seed(steps)
    module = torch.nn.ModuleDict({name: torch.nn.Linear(2, 3) for name in ("used", "unused", "frozen")})
    module["frozen"].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        module["used"](torch.ones(2)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return module, optimizer


def _save(folder, step, keep_last=2):
    module, optimizer = _trained(3)
    return checkpoint.save(folder, step, modules={"model": module}, optimizer=optimizer, keep_last=keep_last)


def test_saved_state_comes_back_bit_for_bit(tmp_path):
    path = _save(tmp_path, 7)
    module, optimizer = _trained(3)
    other, its_optimizer = _trained(0)
    frozen = other["frozen"].weight.clone()
    assert checkpoint.load(path, modules={"model": other}, optimizer=its_optimizer) == 7
    for name, parameter in module["used"].named_parameters():
        loaded = other["used"].get_parameter(name)
        assert torch.equal(loaded, parameter)
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(its_optimizer.state[loaded][key], value), key
    assert torch.equal(other["unused"].weight, module["unused"].weight)
    assert torch.equal(other["frozen"].weight, frozen), "what is frozen is in no checkpoint"
    assert checkpoint.load(path, modules={"model": _trained(0)[0]}) == 7, "without an optimizer: to export"


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = _save(tmp_path, 7)
    with pytest.raises(
        ValueError, match=r"step-00000007 is of another model: model.weight is absent, expected \(2, 2\)"
    ):
        checkpoint.load(path, modules={"model": torch.nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="is no checkpoint"):
        checkpoint.load(tmp_path, modules={"model": torch.nn.Linear(2, 2)})


def test_a_checkpoint_cut_short_is_refused(tmp_path):
    model = torch.nn.Linear(2, 2)
    path = checkpoint.save(
        tmp_path, 1, modules={"model": model}, optimizer=torch.optim.AdamW(model.parameters()), keep_last=1
    )
    (path / ".metadata").write_bytes(b"")
    with pytest.raises(ValueError, match=r"step-00000001 is no whole checkpoint: its \.metadata cannot be read"):
        checkpoint.load(path, modules={"model": model})


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


def test_killed_while_writing_is_not_seen(tmp_path):
    code = (
        "import os, signal, sys; from inbatch.data.files import replacing\n"
        "with replacing(sys.argv[1] + '/step-00000009') as path:\n"
        "    path.mkdir()\n"
        "    (path / 'half').write_text('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    _save(tmp_path, 5)
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY, check=False)
    assert killed.returncode == -9
    assert (tmp_path / ".step-00000009.partial" / "half").exists()
    assert checkpoint.latest(tmp_path) == (5, tmp_path / "step-00000005")
    _save(tmp_path, 9)
    assert checkpoint.latest(tmp_path) == (9, tmp_path / "step-00000009")
    assert not (tmp_path / ".step-00000009.partial").exists()
