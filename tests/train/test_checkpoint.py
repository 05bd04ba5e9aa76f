"""Folders are whole or absent, whatever happens while they are written."""

import hashlib
import pickle
import random
import shutil
import subprocess
import sys
import warnings

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
    return checkpoint.save(folder, step, modules={"model": module}, optimizer=optimizer, keep_last=keep_last).finish()


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


def test_what_is_written_is_the_state_when_it_was_saved(tmp_path):
    module, optimizer = _trained(3)
    before = module["used"].weight.clone()
    saving = checkpoint.save(tmp_path, 7, modules={"model": module}, optimizer=optimizer, keep_last=1)
    with torch.no_grad():
        module["used"].weight.zero_()
    assert not checkpoint.list_checkpoints(tmp_path), "it has no name before all ranks have written"
    checkpoint.load(saving.finish(), modules={"model": module})
    assert torch.equal(module["used"].weight, before)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = _save(tmp_path, 7)
    with pytest.raises(
        ValueError, match=r"step-00000007 is of another model: model.weight is absent, expected \(2, 2\)"
    ):
        checkpoint.load(path, modules={"model": torch.nn.Linear(2, 2)})
    assert checkpoint.damage(tmp_path) == f"{tmp_path} is damaged: SHA256SUMS is missing or is not what was written"


def test_every_flipped_byte_and_every_missing_file_is_found(tmp_path):
    path = _save(tmp_path, 7)
    assert subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=path, check=False).returncode == 0
    files = sorted(path.iterdir())
    assert [file.name for file in files] == ["SHA256SUMS", "index.json", "rank-0.safetensors"]
    assert checkpoint.damage(path) is None
    for file in files:
        content = file.read_bytes()
        for place in {*random.sample(range(len(content)), min(len(content), 150)), 0, len(content) - 1}:
            flipped = bytearray(content)
            flipped[place] ^= 1 << random.randrange(8)
            file.write_bytes(flipped)
            problem = checkpoint.damage(path)
            assert problem is not None, (file.name, place)
            assert file.name in problem or file.name == "SHA256SUMS"
        for length in {0, 1, *random.sample(range(len(content)), 5), *(i for i, b in enumerate(content) if b == 10)}:
            file.write_bytes(content[:length])
            assert checkpoint.damage(path) is not None, (file.name, length)
        file.unlink()
        assert checkpoint.damage(path) is not None
        file.write_bytes(content)
    assert checkpoint.damage(path) is None


def test_the_newest_whole_one_is_taken_with_a_warning(tmp_path):
    assert checkpoint.newest_whole(tmp_path / "absent") is None
    for step in (5, 10, 15):
        _save(tmp_path, step, keep_last=3)
    (tmp_path / "step-00000015" / "index.json").write_bytes(b"")
    (tmp_path / "step-00000010" / "rank-0.safetensors").unlink()
    with pytest.warns(
        UserWarning, match=r"00000015 is damaged: index.json .*; .*00000010 is .*; going on from step-00000005"
    ):
        assert checkpoint.newest_whole(tmp_path) == (5, tmp_path / "step-00000005")
    # The next one takes the place of what was damaged, or belongs to a run that was given up.
    _save(tmp_path, 8)
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [5, 8]
    for file in tmp_path.glob("*/SHA256SUMS"):
        file.unlink()
    with pytest.raises(ValueError, match=r"no checkpoint is whole: .*00000008 is damaged: SHA256SUMS is missing"):
        checkpoint.newest_whole(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("rank-0.safetensors", lambda _: pickle.dumps(print), r"rank-0\.safetensors is not a safetensors file"),
        ("index.json", lambda _: pickle.dumps(print), r"index\.json was not written by a run: Invalid JSON"),
        ("index.json", lambda text: text.replace(b'"step": 7', b'"step": {"a": 1}'), "valid integer"),
        ("index.json", lambda text: text.replace(b"rank-0", b"../rank-0"), "should match pattern"),
        ("index.json", lambda text: text.replace(b'safetensors", 0, 3', b'safetensors", 0, 2'), "are not all of it"),
    ],
)
def test_what_no_run_wrote_is_one_line_and_runs_nothing(tmp_path, name, change, message):
    path = _save(tmp_path, 7)
    content = (path / name).read_bytes()
    (path / name).write_bytes(change(content))
    assert (path / name).read_bytes() != content
    with pytest.raises(ValueError, match=message):
        checkpoint.load(path, modules={"model": _trained(0)[0]})


def test_one_that_is_deleted_while_it_is_read_is_gone_and_not_damaged(tmp_path, monkeypatch):
    old, new = _save(tmp_path, 5), _save(tmp_path, 10)
    look = checkpoint.damage

    def damage(path):
        if path == new:
            shutil.rmtree(new)
        return look(path)

    monkeypatch.setattr(checkpoint, "damage", damage)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.newest_whole(tmp_path) == (5, old)
    (old / "rank-0.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"rank-0\.safetensors"):  # upon which export takes a newer one
        checkpoint.load(old, modules={"model": _trained(0)[0]})


def test_a_checkpoint_lists_only_files_of_its_own_folder(tmp_path):
    path = _save(tmp_path, 7)
    (tmp_path / "other").write_text("x")
    with (path / "SHA256SUMS").open("a") as file:
        file.write(f"{hashlib.sha256(b'x').hexdigest()}  ../other\n")
    assert checkpoint.damage(path) is not None


def test_equal_states_give_equal_bytes(tmp_path):
    one, two = (_save(tmp_path / name, 7) for name in ("one", "two"))
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes(), file.name


def test_newest_are_kept_and_found(tmp_path):
    for step in (5, 10, 15):
        _save(tmp_path, step)
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [10, 15]
    # Neither an interrupted write nor anything else in the folder counts.
    (tmp_path / ".step-00000020.partial").mkdir()
    (tmp_path / "step-20").mkdir()
    (tmp_path / "notes.txt").touch()
    assert checkpoint.newest_whole(tmp_path) == (15, tmp_path / "step-00000015")


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
    assert checkpoint.newest_whole(tmp_path) == (5, tmp_path / "step-00000005")
    for half in (".step-00000003.old", ".step-00000007.partial", ".step-00000009.old"):
        (tmp_path / half).mkdir()
    _save(tmp_path, 9)
    assert checkpoint.newest_whole(tmp_path) == (9, tmp_path / "step-00000009")
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".step-00000003.old", ".step-00000007.partial"]
    checkpoint.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005", "step-00000009"]
