"""Kill runs at random moments until they are done, and compare them with one that nobody disturbed.

`python -m tests.train.kills 200` kills that many times. Runs are forks of one process that has everything imported.
"""

import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from tqdm import tqdm

from inbatch.train.config import Config
from inbatch.train.loop import train
from tests.train.test_loop import make_config, write_folder

STEPS = 30
_KILLED = -signal.SIGKILL


def _train(config: Config) -> None:
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    train(config)


def run(config: Config, kill_after_s: float | None) -> int | None:
    """Train in a fork, kill it after so many seconds, and return its exit code."""
    process = multiprocessing.get_context("fork").Process(target=_train, args=(config,))
    process.start()
    process.join(kill_after_s)
    if process.is_alive():
        os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    return process.exitcode


def result(config: Config) -> dict[str, bytes]:
    """What must be equal: the figures, the model and the checkpoints."""
    root = Path(config.train.output_dir)
    files = [root / "metrics.jsonl", *(root / "model").rglob("*"), *(root / "checkpoints").rglob("*")]
    return {
        str(file.relative_to(root)): file.read_bytes().replace(root.name.encode(), b"")  # the card names the run
        for file in files
        if file.is_file()
    }


def kill(root: Path, kills: int, seed: int = 0) -> int:
    """Kill `kills` times, spread over as many runs as that takes, and return how many runs ended with equal bytes."""
    # Before the first bar, since classes made of tqdm take the one that is there: the default one is shared by forks,
    # and a killed one may hold it.
    tqdm.set_lock(threading.RLock())
    chance = random.Random(seed)
    folder = write_folder(root)
    settings = {"train": {"max_steps": STEPS}, "checkpoint": {"every_steps": 3}, "eval": {"data": str(folder / "beir")}}
    undisturbed = make_config(folder, root / "undisturbed", **settings)
    assert run(undisturbed, None) == 0
    duration_s, expected, runs = float("inf"), result(undisturbed), 0
    assert f"model{os.sep}model.safetensors" in expected
    while kills > 0:
        runs += 1
        config = make_config(folder, root / f"run-{runs}", **settings)
        since = time.monotonic()
        # The first run tells how long one takes whose caches are warm.
        while (code := run(config, chance.uniform(0, 1.5 * duration_s) if kills > 0 and runs > 1 else None)) == _KILLED:
            kills -= 1
        duration_s = min(duration_s, time.monotonic() - since)
        assert code == 0, f"run {runs} ended with {code}"
        found = result(config)
        assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
        differing = [name for name in found if found[name] != expected[name]]
        assert not differing, f"run {runs} differs in {differing}"
        print(f"run {runs}: equal; {kills} kills are left", flush=True)
    return runs


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(kill(Path(place), int(sys.argv[1])), "runs, each with the bytes of the undisturbed one")
