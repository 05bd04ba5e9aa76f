"""The folder of a run, `train.output_dir`: who may write to it, what lies in it, and what a resumed run finds there.

    .lock                             held by the process that writes
    config.yaml  data.json            the settings and the data that the run began with
    metrics.jsonl  speed.jsonl        a line for each logged step and each evaluation
    tensorboard/  loggers.json        the same as curves; the run's names at other loggers
    checkpoints/                      see `inbatch.train.checkpoint`
    teacher/                          with distill.teacher, its vectors
    best/                             with eval.keep_best, the model of the best evaluation
    model/  done.json                 written last

Rank 0 reads and writes all but the checkpoints. Every rank calls the methods, so that an error there is raised on all.
"""

import errno
import fcntl
import functools
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, ParamSpec, TypeVar

from inbatch.collectives import on_rank_0, world_size
from inbatch.data.files import write_json, write_text
from inbatch.train.config import Config, differences, dump
from inbatch.train.config_file import load

P = ParamSpec("P")
T = TypeVar("T")


def _on_rank_0(method: Callable[P, T]) -> Callable[P, T]:
    """Decorate a method that rank 0 runs for all; its value, or its error, is every rank's."""

    @functools.wraps(method)
    def call(*args: P.args, **options: P.kwargs) -> T:
        return on_rank_0(lambda: method(*args, **options))

    return call


class RunFolder:
    """One run's folder. `path` exists from `locked` on; `config.yaml` from `claim` on."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.best = self.path / "best"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out; ValueError, on every rank, while another process writes to the folder.

        The kernel releases the lock when rank 0 ends, however it ends. The file `.lock` stays and means nothing.
        """
        held: list[IO] = []
        on_rank_0(lambda: held.append(self._lock()))
        try:
            yield
        finally:
            for file in held:
                file.close()

    def _lock(self) -> IO:
        path, saved = self.path.absolute(), "config_sentence_transformers.json"
        for folder in (path, *path.parents):
            if (folder / saved).is_file() or (folder / "query" / saved).is_file():
                raise ValueError(
                    f"train.output_dir {self.path} is or lies in the saved model {folder}, which is replaced as a "
                    "whole when it is saved again: choose a folder outside it"
                )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ValueError(
                f"train.output_dir {self.path} is a file or lies below one: choose a folder, new or not"
            ) from None
        file = (self.path / ".lock").open("a")
        try:
            # Not flock: that lock would be shared with the forked processes that make batches, which outlive a killed
            # rank for seconds, in which the run could not be started again.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.close()
                raise ValueError(
                    f"{self.path} is being written to by another run: wait for its end, or choose another "
                    "train.output_dir"
                ) from None
            # A file system without locks; a run there is as good as it can be.
        return file

    @_on_rank_0
    def check_config(self, config: Config) -> None:
        """Raise ValueError if the folder holds a run with settings that make it a different one."""
        known = self.path / "config.yaml"
        changed = differences(load(known), config) if known.exists() else {}
        if changed:
            listed = "; ".join(f"{key} was {before!r}, is {now!r}" for key, (before, now) in changed.items())
            raise ValueError(
                f"{self.path} holds a run with another configuration ({listed}): choose another train.output_dir"
            )

    @_on_rank_0
    def check_data(self, config: Config, examples: int) -> None:
        """Raise ValueError if the run began with more or fewer examples, or, where that matters, ranks."""
        began = self.read("data.json")
        ranks, before = began.get("ranks", world_size()), began.get("examples", examples)
        if config.loss.negatives == "local" and ranks != world_size():
            raise ValueError(
                f"loss.negatives is local, so that a query's negatives depend on the number of ranks: the run in "
                f"{self.path} began with {ranks}, and this one has {world_size()}; start as many, or choose another "
                "train.output_dir"
            )
        if before != examples:
            raise ValueError(
                f"data.train holds {examples} examples, but the run in {self.path} began with {before}, and would "
                "repeat some and skip others: bring the data back, or choose another train.output_dir"
            )

    @_on_rank_0
    def check_lines(self, config: Config, step: int) -> None:
        """Warn if metrics.jsonl ends before the checkpoint of `step`: its lines were on disk before the checkpoint."""
        known = self.path / "config.yaml"
        every = (load(known) if known.exists() else config).train.log_every
        last = max((int(line["step"]) for line in read_metrics(self.path)), default=0)
        if last < (step // every * every or 1):
            warnings.warn(
                f"{self.path / 'metrics.jsonl'} ends after step {last}, and the run goes on from step {step}: the "
                "figures between are lost",
                stacklevel=2,
            )

    @_on_rank_0
    def claim(self, config: Config, examples: int) -> None:
        """Make the folder this run's. It is the last preparation, so that a start that failed claims nothing."""
        write_json(self.path / "data.json", {"examples": examples, "ranks": world_size()})
        write_text(self.path / "config.yaml", dump(config))

    @_on_rank_0
    def done(self) -> Mapping[str, Any]:
        """Return the note of the finished run: its steps, and the settings that ended it early; empty before."""
        return self.read("done.json")

    @_on_rank_0
    def finish(self, steps: int, ended_by: Sequence[Any] | None = None) -> None:
        """Mark the run as finished after `steps` steps; ended_by: the settings that ended it early."""
        early = {} if ended_by is None else {"ended_by": list(ended_by)}
        write_json(self.path / "done.json", {"steps": steps, **early})

    def drop_lines_after(self, step: int) -> None:
        """Remove the lines of later steps, which a resumed run writes again. Rank 0 alone calls it."""
        for name in ("metrics.jsonl", "speed.jsonl"):
            path = self.path / name
            if path.exists():
                kept = [json.dumps(line) + "\n" for line in read_lines(path) if line["step"] <= step]
                if "".join(kept).encode() != path.read_bytes():
                    write_text(path, "".join(kept))

    def read(self, name: str) -> Mapping[str, Any]:
        """Return the JSON object in a file of the run, empty where the file is missing or damaged."""
        path = self.path / name
        try:
            value = json.loads(path.read_bytes())
            if isinstance(value, dict):
                return value
        except FileNotFoundError:
            return {}
        except ValueError:
            pass
        warnings.warn(f"{path} is damaged and is not used", stacklevel=2)
        return {}


def read_metrics(folder: str | Path) -> list[dict[str, float]]:
    """Return the lines of a run's metrics.jsonl: steps have "loss", evaluations "eval_...", both "step"."""
    return read_lines(Path(folder) / "metrics.jsonl")


def read_lines(path: Path) -> list[dict[str, float]]:
    """Return the figures in metrics.jsonl or speed.jsonl; damaged lines are left out with a warning.

    A last line without its end was being written when the process was killed, and is left out without a word.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    figures = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            figures.append(value)
        else:
            warnings.warn(f"{path}, line {number} is damaged and is not used", stacklevel=2)
    return figures
