"""Files of a run that were flipped or cut: named, and the run goes on to the same figures."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from inbatch.train.loop import train
from inbatch.train.run_folder import read_metrics
from tests.train.test_loop import folder, make_config, read_lines  # noqa: F401


def config_of(data, output, steps):
    return make_config(
        data,
        output,
        train={"max_steps": steps},
        optim={"schedule": "constant", "warmup_ratio": 0.0},
        checkpoint={"every_steps": 2, "keep_last": 3},
    )


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):  # noqa: F811
    """A run of 8 steps, and one that is done after 6."""
    root = tmp_path_factory.mktemp("runs")
    for steps in (6, 8):
        train(config_of(folder, root / str(steps), steps))
    return root


def go_on(folder, runs, output, damage, message):  # noqa: F811
    """Damage a copy of the shorter run, go on with it to 8 steps, and return the lines of metrics.jsonl."""
    shutil.copytree(runs / "6", output)
    damage(output)
    with pytest.warns(UserWarning, match=message):
        train(config_of(folder, output, 8))
    assert json.loads((output / "done.json").read_text()) == {"steps": 8}
    assert json.loads((output / "data.json").read_text()) == json.loads((runs / "8" / "data.json").read_text())
    return read_lines(output / "metrics.jsonl")


@pytest.mark.parametrize(
    ("file", "place"),
    [("rank-0.safetensors", 3), ("rank-0.safetensors", 0.6), ("index.json", 0.5), ("SHA256SUMS", 70)],
)
def test_a_flipped_byte_of_the_newest_checkpoint_costs_two_steps(folder, runs, tmp_path, file, place):  # noqa: F811
    def flip(output: Path) -> None:
        path = output / "checkpoints" / "step-00000006" / file
        content = bytearray(path.read_bytes())
        content[place if isinstance(place, int) else int(place * len(content))] ^= 1 << 4
        path.write_bytes(content)

    message = "step-00000006 is damaged: .*; going on from step-00000004"
    lines = go_on(folder, runs, tmp_path / "run", flip, message)
    assert lines == read_lines(runs / "8" / "metrics.jsonl")


@pytest.mark.parametrize("share", [0, 0.5, 0.9])
@pytest.mark.parametrize("name", ["done.json", "data.json", "metrics.jsonl"])
def test_a_torn_file_is_named_and_whole_in_the_end(folder, runs, tmp_path, name, share):  # noqa: F811
    def tear(output: Path) -> None:
        os.truncate(output / name, int(share * (output / name).stat().st_size))

    message = "metrics.jsonl ends after step [035]" if name == "metrics.jsonl" else f"{name} is damaged"
    lines = go_on(folder, runs, tmp_path / "run", tear, message)
    whole = read_lines(runs / "8" / "metrics.jsonl")
    assert lines[-2:] == whole[-2:]
    assert set(lines) <= set(whole)
    assert lines == whole or name == "metrics.jsonl"


def test_the_figures_are_on_disk_before_the_checkpoint_that_follows_them(folder, tmp_path, monkeypatch):  # noqa: F811
    """By the order of the calls of fsync."""
    config = config_of(folder, tmp_path / "run", 4)
    synced, seen, fsync = 0, [], os.fsync

    def note(descriptor):
        nonlocal synced
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path.endswith("metrics.jsonl"):
            synced = len(read_metrics(config.train.output_dir))
        if "step-" in path:
            seen.append((int(path.partition("step-")[2][:8]), synced))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    train(replace(config, checkpoint=replace(config.checkpoint, every_steps=1)))
    assert {step for step, _ in seen} == {1, 2, 3, 4}
    assert all(lines >= step for step, lines in seen)
