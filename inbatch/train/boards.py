"""Loggers beside metrics.jsonl: TensorBoard's files, Weights & Biases, MLflow. Rank 0 alone opens them.

wandb and mlflow read servers, projects and keys from their own variables (WANDB_*, MLFLOW_*). `loggers.json` in the
run's folder keeps their names of the run, so that a resumed one goes on there.
"""

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch.utils.tensorboard.writer import SummaryWriter

from inbatch.data.files import naming, write_json
from inbatch.train.config import Config, flatten
from inbatch.train.run_folder import RunFolder


def check_loggers(names: Sequence[str]) -> None:
    """Raise ValueError for a logger whose package is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise ValueError(f"train.loggers names {name}, which is not installed: pip install {name}, or leave it out")


def open_boards(folder: Path, config: Config, first_step: int) -> "list[_TensorBoard | _Wandb | _MLflow]":
    """Open the loggers that the configuration names for a run that goes on after `first_step` steps.

    Each has `add(figures, step)` and `close()`.
    """
    known = dict(RunFolder(folder).read("loggers.json")) if first_step else {}
    opened: list[_TensorBoard | _Wandb | _MLflow] = []
    for name in dict.fromkeys(config.train.loggers):
        if name == "tensorboard":
            opened.append(_TensorBoard(folder / name, first_step))
            continue
        try:
            board = (_Wandb if name == "wandb" else _MLflow)(folder, flatten(config), known.get(name))
        except OSError:
            raise
        except Exception as error:  # they have classes of their own for a missing key or an unknown server
            raise ValueError(f"train.loggers: {name} does not start: {' '.join(str(error).split())}") from error
        opened.append(board)
        known[name] = board.run_id
    if known:
        write_json(folder / "loggers.json", known)
    return opened


class _TensorBoard:
    def __init__(self, folder: Path, first_step: int):
        self._folder, self._hook = folder, threading.excepthook
        threading.excepthook = _but_of_tensorboard(self._hook)
        with naming(folder):
            self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def add(self, figures: Mapping[str, float], step: int) -> None:
        with naming(self._folder):
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        with naming(self._folder):
            self._writer.close()
        threading.excepthook = self._hook


def _but_of_tensorboard(hook: Callable[[Any], object]) -> Callable[[Any], None]:
    """Return a hook that hides the traceback of the writing thread, whose error `add` and `close` raise."""

    def call(failed: Any) -> None:
        if not type(failed.thread).__module__.startswith("tensorboard."):
            hook(failed)

    return call


class _Wandb:
    def __init__(self, folder: Path, config: dict[str, Any], run_id: str | None):
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(dir=str(folder), id=run_id, resume="allow", name=folder.name, config=config)
        self.run_id = self._run.id
        # A step of its own: wandb drops what is logged again for an earlier one, as a resumed run does.
        self._run.define_metric("*", step_metric="step")

    def add(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log({**figures, "step": step})

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, folder: Path, config: dict[str, Any], run_id: str | None):
        import mlflow  # pyright: ignore[reportMissingImports]

        self._mlflow = mlflow
        self.run_id = mlflow.start_run(run_id=run_id, run_name=None if run_id else folder.name).info.run_id
        if run_id is None:
            mlflow.log_params({name: str(value)[:500] for name, value in config.items()})

    def add(self, figures: Mapping[str, float], step: int) -> None:
        # Names such as nDCG@10 and P(rel=2)@5 hold characters that it refuses.
        named = {re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_")): value for name, value in figures.items()}
        self._mlflow.log_metrics(named, step=step)

    def close(self) -> None:
        self._mlflow.end_run()
