"""Runs that are signalled or lose a rank: each ends in time, with one line, a status and what was kept."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from inbatch.cli import run
from inbatch.train import checkpoint
from inbatch.train.config import dump
from inbatch.train.run_folder import read_metrics
from tests.helpers import REPOSITORY
from tests.train.test_loop import folder, make_config, pids_of  # noqa: F401


def _heed_signals() -> None:
    """Heed what a process in the foreground heeds; under nohup some are ignored, and children inherit that."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def written(config) -> Path:
    file = Path(f"{config.train.output_dir}.yaml")
    file.write_text(dump(config).replace("num_workers: 0", "num_workers: 1"))
    return file


def wait_for(path: Path, lines: int, process) -> None:
    """Wait until a file, metrics.jsonl, has so many lines."""
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Running:
    """`inbatch train` in processes of its own, or of a launcher's; python_path: a folder with a sitecustomize.py."""

    def __init__(self, config, processes: int, launcher: list[str] | None = None, python_path: Path | None = None):
        self.settings, self.folder, self.config = config, Path(config.train.output_dir), written(config)
        command = [sys.executable, "-m", *(launcher or []), "inbatch", "train", str(self.config)]
        paths = os.pathsep.join(map(str, filter(None, (python_path, os.environ.get("PYTHONPATH")))))
        self.process = subprocess.Popen(
            command if launcher else [*command, "--nproc-per-node", str(processes)],
            cwd=REPOSITORY,
            env=os.environ | ({"PYTHONPATH": paths} if paths else {}),
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_heed_signals,
        )

    def wait_for(self, lines: int) -> None:
        wait_for(self.folder / "metrics.jsonl", lines, self.process)

    def ranks(self) -> list[int]:
        """The processes that train, by rank."""
        found = {}
        for pid in pids_of(str(self.config)):
            values = dict(entry.partition("=")[::2] for entry in Path(f"/proc/{pid}/environ").read_text().split("\0"))
            parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
            if "RANK" in values and int(parent) == self.process.pid:
                found[int(values["RANK"])] = pid
        return [found[rank] for rank in sorted(found)]

    def end(self) -> tuple[int, list[str]]:
        """The status and the errors, once no process is left."""
        errors = [line for line in self.process.communicate(timeout=60)[1].splitlines() if "inbatch: error" in line]
        deadline = time.monotonic() + 20
        while pids_of(str(self.config)):
            assert time.monotonic() < deadline, "neither a rank nor a process that makes batches is left"
            time.sleep(0.1)
        return self.process.returncode, errors


@pytest.fixture
def start(folder, tmp_path):  # noqa: F811
    started = []

    def start_(processes: int, **groups) -> Running:
        settings = {"max_steps": 10_000, **groups.pop("train", {})}
        started.append(Running(make_config(folder, tmp_path / "run", train=settings, **groups), processes))
        return started[-1]

    yield start_
    for running in started:
        running.process.kill()
        running.process.wait()


@pytest.mark.parametrize(
    ("processes", "number", "to_launcher"),
    [(1, signal.SIGHUP, True), (2, signal.SIGTERM, True), (2, signal.SIGTERM, False)],
)
def test_a_run_that_is_asked_to_stop_saves_and_says_so(start, processes, number, to_launcher):
    """Also where checkpoints are not asked for, and a rank alone is signalled."""
    running = start(processes)
    running.wait_for(3)
    os.kill(running.process.pid if to_launcher else running.ranks()[1], number)
    status, errors = running.end()
    assert status == 128 + number, errors
    steps = len(read_metrics(running.folder))
    found = checkpoint.newest_whole(running.folder / "checkpoints")
    assert found is not None
    assert found[0] == steps
    (line,) = errors
    assert f"stopped by {number.name} after {steps} steps, which are saved: the same command goes on" in line


def test_the_keyboard_ends_it(start):
    running = start(2)
    running.wait_for(2)
    running.process.send_signal(signal.SIGINT)
    assert running.end() == (130, ["inbatch: error: interrupted"])


def test_a_rank_that_is_stopped_is_named_in_time(start):
    running = start(2, train={"timeout_minutes": 0.2})
    running.wait_for(2)
    os.kill(running.ranks()[1], signal.SIGSTOP)
    since = time.monotonic()
    status, errors = running.end()
    assert (status, len(errors)) == (1, 1), errors
    assert time.monotonic() - since < 12 + 30
    # Its last word is up to a second old, and so may be from before the first step.
    assert "has not been heard of for 0.2 minutes (train.timeout_minutes); its last word: " in errors[0]
    assert "rank 1 on" in errors[0]


def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path):
    """More kills: `python -m tests.train.kills 200`."""
    command = [sys.executable, "-m", "tests.train.kills", "4"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "runs, each with the bytes of the undisturbed one" in done.stdout


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 1 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread says nothing
@pytest.mark.parametrize("what", ["checkpoints", "model", "export", "metrics"])
def test_a_full_disk_is_one_line_with_a_path(folder, full_disk, tmp_path, capsys, what):  # noqa: F811
    """The old model stays."""
    output = tmp_path / "run" if what == "export" else full_disk / "run"
    config = make_config(folder, output, checkpoint={"every_steps": 2 if what in ("checkpoints", "export") else None})
    (tmp_path / "config.yaml").write_text(dump(config))
    if what == "export":
        assert run(["train", str(tmp_path / "config.yaml")]) == 0
    room = {"checkpoints": 60, "model": 60, "export": 20, "metrics": 0}[what]
    if what == "metrics":
        (full_disk / "run").mkdir()
    with (full_disk / "filler").open("wb") as file:
        file.write(b"x" * ((1024 - room) * 1024 - 8192 * (what == "metrics")))
    capsys.readouterr()
    command = (
        ["export", str(output), str(full_disk / "model")]
        if what == "export"
        else ["train", str(tmp_path / "config.yaml")]
    )
    assert run(command) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "inbatch: error" in line]
    assert "No space left on device" in line
    assert str(full_disk) in line
    assert not list(full_disk.rglob("*.partial"))


@pytest.mark.parametrize("delay_s", [0.3, 3])
def test_a_launcher_that_is_killed_leaves_nobody(start, delay_s):
    running = start(2)
    deadline = time.monotonic() + 60
    while len(running.ranks()) < 2:
        assert time.monotonic() < deadline
    time.sleep(delay_s)
    running.process.kill()
    assert running.end()[0] == -signal.SIGKILL
