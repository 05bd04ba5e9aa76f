"""What a run tells: metrics.jsonl, speed.jsonl, TensorBoard and the progress bar. Only rank 0 writes.

metrics.jsonl holds what is a function of the configuration alone, so that two runs can be compared line by line;
speed.jsonl holds what also depends on the machine.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.tensorboard.writer import SummaryWriter
from tqdm import tqdm

from inbatch.data.files import write_text


class RunLog:
    """The open logs of a run that continues after `first_step` steps; later lines of an interrupted run are dropped."""

    def __init__(self, folder: str | Path, *, first_step: int, total_steps: int, enabled: bool, progress: bool):
        self._enabled, self._progress = enabled, progress
        self.best: dict[str, float] = {}
        if not enabled:
            return
        self._folder = folder = Path(folder)
        for name in ("metrics.jsonl", "speed.jsonl"):
            _truncate(folder / name, first_step)
        self._metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
        self._speed = (folder / "speed.jsonl").open("a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else None)
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=None if progress else True)
        for line in read_metrics(folder):
            self._keep_best(line)

    def note(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self._enabled:
            tqdm.write(text, file=sys.stderr)

    def advance(self) -> None:
        """One more step is done."""
        if self._enabled:
            self._bar.update(1)

    def step(self, step: int, metrics: Mapping[str, float], speed: Mapping[str, float]) -> None:
        """The figures of one optimizer step."""
        if not self._enabled:
            return
        self._write(self._metrics, step, metrics, "train")
        self._write(self._speed, step, speed, "speed")
        loss, pairs_per_s = f"{metrics['loss']:.4f}", f"{speed['pairs_per_s']:.0f}"
        self._bar.set_postfix({"loss": loss, "pairs/s": pairs_per_s})
        if self._progress and self._bar.disable:  # not a terminal, where a bar would fill the log
            self.note(f"step {step} of {self._bar.total}: loss {loss}, {pairs_per_s} pairs/s")

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """The retrieval figures after `step` steps; the first measure decides what is best."""
        if not self._enabled:
            return
        line = {f"eval_{name}": value for name, value in figures.items()}
        self._keep_best({"step": step, **line})
        self._write(self._metrics, step, {**line, **self.best}, "eval")
        self.note(f"step {step}: " + "  ".join(f"{name} {value:.4f}" for name, value in figures.items()))

    def has_evaluation(self, step: int) -> bool:
        """Whether the figures after `step` steps are in metrics.jsonl, on the rank that writes it."""
        return any(line["step"] == step and "loss" not in line for line in read_metrics(self._folder))

    def close(self) -> None:
        if self._enabled:
            self._bar.close()
            self._board.close()
            self._metrics.close()
            self._speed.close()

    def _write(self, file, step: int, figures: Mapping[str, float], group: str) -> None:
        file.write(json.dumps({"step": step, **figures}) + "\n")
        for name, value in figures.items():
            self._board.add_scalar(f"{group}/{name}", value, step)

    def _keep_best(self, line: Mapping[str, float]) -> None:
        name = next((key for key in line if key.startswith("eval_")), None)
        if name is not None and line[name] > self.best.get(f"best_{name}", float("-inf")):
            self.best = {f"best_{name}": line[name], "best_step": line["step"]}


class Stopwatch:
    """Where a run's time goes: seconds by activity, and the speed of its steps.

    Training is all from asking for the first batch to the end of the last step, compilation and waiting for batches
    included, but evaluations and checkpoints. What a GPU was given to do counts as the activity that gave it.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(("opening", "training", "evaluation", "saving"), 0.0)
        self._activity, self._since = "opening", time.perf_counter()
        self._steps, self._pairs, self._read_s = 0, 0, 0.0

    def turn_to(self, activity: str) -> None:
        """From here on time counts as `activity`."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self._activity] += now - self._since
        self._activity, self._since = activity, now

    @contextmanager
    def during(self, activity: str) -> Iterator[None]:
        before = self._activity
        self.turn_to(activity)
        yield
        self.turn_to(before)

    def count(self, *, pairs: int) -> None:
        """One step with so many pairs over all ranks is done."""
        self._steps += 1
        self._pairs += pairs

    def read(self) -> dict[str, float]:
        """The speed of the steps since the last reading, and the seconds of training so far."""
        self.turn_to(self._activity)
        train_s = self.seconds["training"]
        seconds, self._read_s = train_s - self._read_s, train_s
        figures = {"pairs_per_s": self._pairs / seconds, "step_ms": 1e3 * seconds / self._steps, "train_s": train_s}
        self._steps, self._pairs = 0, 0
        return figures

    def summary(self) -> str:
        """One line: the seconds of every activity so far."""
        self.turn_to(self._activity)
        return ", ".join(f"{activity} {seconds:.1f} s" for activity, seconds in self.seconds.items())


def read_metrics(folder: str | Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl: steps have "loss", evaluations "eval_...", both "step"."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _truncate(path: Path, last_step: int) -> None:
    """Keeps the lines up to `last_step`; a line cut short by a crash goes as well."""
    if not path.exists():
        return
    if last_step == 0:
        path.unlink()
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= last_step]
    if kept != lines:
        write_text(path, "".join(kept))
