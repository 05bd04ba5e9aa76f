"""The report of a run: the candidates of a query, settings that look wrong, figures, and times.

metrics.jsonl holds what is a function of the configuration alone, so that two runs can be compared line by line;
speed.jsonl holds what also depends on the machine.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import torch
from tqdm import tqdm

from inbatch import collectives
from inbatch.data import Mixture
from inbatch.data.batches import Part
from inbatch.data.files import naming, sync
from inbatch.train.boards import open_boards
from inbatch.train.config import Config, unused
from inbatch.train.run_folder import RunFolder, read_metrics

OnFigures = Callable[[int, Mapping[str, float]], object]


class Report:
    """Write the logs of a run that goes on after `first_step` steps; later lines of an interrupted run are dropped.

    best_step, stale: after how many steps the figure that decides was best, and how many evaluations came since. They
    are functions of metrics.jsonl, so that a resumed run has them.
    """

    def __init__(
        self, folder: RunFolder, config: Config, first_step: int, total_steps: int, on_figures: OnFigures | None
    ):
        folder.drop_lines_after(first_step)
        self._on_figures = on_figures
        self._progress = config.train.progress
        self._decides, self._lower = config.eval.best_key, config.eval.best_key == "validation_loss"
        self._metrics, self._speed = (
            (folder.path / name).open("a", encoding="utf-8", buffering=1) for name in ("metrics.jsonl", "speed.jsonl")
        )
        self._boards = open_boards(folder.path, config, first_step)
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=None if self._progress else True)
        self._best = 0.0
        self.best_step: int | None = None
        self.stale = 0
        self._evaluated: dict[int, set[str]] = {}
        for line in read_metrics(folder.path):
            self._remember(line)

    def note(self, text: str) -> None:
        """Print a line above the progress bar."""
        tqdm.write(text, file=sys.stderr)

    def advance(self) -> None:
        """Count a step as done."""
        self._bar.update(1)

    def step(self, step: int, metrics: Mapping[str, float], speed: Mapping[str, float]) -> None:
        """Write the figures of one optimizer step."""
        self._write(self._metrics, step, metrics, "train")
        self._write(self._speed, step, speed, "speed")
        loss, pairs_per_s = f"{metrics['loss']:.4f}", f"{speed['pairs_per_s']:.0f}"
        self._bar.set_postfix({"loss": loss, "pairs/s": pairs_per_s})
        if self._progress and self._bar.disable:  # not a terminal, where a bar would fill the log
            self.note(f"step {step} of {self._bar.total}: loss {loss}, {pairs_per_s} pairs/s")

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the figures of an evaluation after `step` steps, and the best so far."""
        self._remember({"step": step, **figures})
        known = {} if self.best_step is None else {f"best_{self._decides}": self._best, "best_step": self.best_step}
        self._write(self._metrics, step, {**figures, **known}, "eval")
        self.note(f"step {step}: " + "  ".join(f"{name} {value:.4f}" for name, value in figures.items()))

    def evaluated(self, step: int) -> set[str]:
        """Return which kinds of figures after `step` steps are in metrics.jsonl: validation, sample, eval."""
        return self._evaluated.get(step, set())

    def sync(self) -> None:
        """Force the lines to disk: those up to a checkpoint's step must not be lost where the checkpoint is not."""
        for file in (self._metrics, self._speed):
            sync(file.name)

    def close(self) -> None:
        """Close the files and the progress bar."""
        for part in (self._bar, *self._boards, self._metrics, self._speed):
            part.close()

    def _write(self, file: IO[str], step: int, figures: Mapping[str, float], group: str) -> None:
        with naming(file.name):
            file.write(json.dumps({"step": step, **figures}) + "\n")
        for board in self._boards:
            board.add({f"{group}/{name}": value for name, value in figures.items()}, step)
        if self._on_figures is not None and file is self._metrics:
            self._on_figures(step, figures)

    def _remember(self, line: Mapping[str, float]) -> None:
        kinds = {name.split("_")[0] for name in line} & {"validation", "sample", "eval"}
        if not kinds:
            return
        step = int(line["step"])
        self._evaluated.setdefault(step, set()).update(kinds)
        if self._decides in line:
            value, before = line[self._decides], self._best
            if self.best_step is None or (value < before if self._lower else value > before):
                self._best, self.best_step, self.stale = value, step, 0
            else:
                self.stale += 1


class NoReport(Report):
    """Stand for the report on ranks other than the first, which write nothing."""

    best_step = None

    def __init__(self):
        pass

    def _nothing(self, *arguments: object, **options: object) -> None:
        pass

    note = advance = step = evaluation = sync = close = _nothing


class Stopwatch:
    """Measure where a run's time goes: seconds by activity, and the speed of its steps.

    Training runs from the request for the first batch to the end of the last step. It includes compilation and waiting
    for batches, and excludes evaluations and checkpoints. A GPU's work counts as the activity that launched it.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(("opening", "training", "evaluation", "saving"), 0.0)
        self._activity, self._since = "opening", time.perf_counter()
        self._steps, self._pairs, self._read_s = 0, 0, 0.0

    def turn_to(self, activity: str) -> None:
        """Count time as `activity` from here on."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        collectives.doing(activity)
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
        """Count a step as done, with its pairs over all ranks."""
        self._steps += 1
        self._pairs += pairs

    def read(self) -> dict[str, float]:
        """Return the speed of the steps since the last reading, and the seconds of training so far."""
        self.turn_to(self._activity)
        train_s = self.seconds["training"]
        seconds, self._read_s = train_s - self._read_s, train_s
        figures = {"pairs_per_s": self._pairs / seconds, "step_ms": 1e3 * seconds / self._steps, "train_s": train_s}
        self._steps, self._pairs = 0, 0
        return figures

    def summary(self) -> str:
        """Return one line: the seconds of every activity so far."""
        self.turn_to(self._activity)
        return ", ".join(f"{activity} {seconds:.1f} s" for activity, seconds in self.seconds.items())


@dataclass(frozen=True, kw_only=True)
class FirstBatch:
    """Count the first part of the first step, over all ranks."""

    queries: list[int]  # by rank
    passages: list[int]  # by rank
    duplicates: float  # share of the queries with another copy of their positive among the passages
    tokens: int  # of this rank, padding included


def look_at(part: Part) -> FirstBatch:
    """Return counts over all ranks; every rank calls it."""
    batch = part.batch
    ids = {"queries": batch.query_ids, "passages": batch.passage_ids}
    rows = collectives.agree("the first batch", ids)
    positive_ids_B = batch.passage_ids[batch.positives]
    passage_ids_N = collectives.all_gather(batch.passage_ids, rows=rows["passages"])
    known_U, counts_U = torch.unique(passage_ids_N, return_counts=True)
    twice = collectives.all_reduce((counts_U[torch.searchsorted(known_U, positive_ids_B)] > 1).sum())
    return FirstBatch(
        queries=rows["queries"],
        passages=rows["passages"],
        duplicates=int(twice) / max(1, sum(rows["queries"])),
        tokens=batch.queries["input_ids"].numel() + batch.passages["input_ids"].numel(),
    )


def mixture(config: Config, plan: Mixture) -> list[str]:
    """Return lines on how an epoch is drawn from several sources, and how these differ."""
    sources = config.data.sources
    if len(sources) == 1:
        return []
    unit = "rows" if plan.mixed else "batches"
    drawn = "every batch drawn from all sources" if plan.mixed else "every batch from one source"
    lines = [f"an epoch has {plan.steps_per_epoch} steps, {drawn}:"]
    for place, (source, plan_of_it, draws) in enumerate(zip(sources, plan.plans, plan.draws(0).tolist(), strict=True)):
        settings = ", ".join(f"{key} {value!r}" for key, value in source.items() if key not in ("path", "columns"))
        lines.append(
            f"  source {place}, {source['path']}: {draws} {unit} ({draws / plan.draws_per_epoch:.1%}), "
            f"{draws / plan_of_it.steps_per_epoch:.2f} passes over {plan_of_it.num_examples} examples"
            + (f"; {settings}" if settings else "")
        )
    return lines


def candidates(config: Config, first: FirstBatch, plan: Mixture) -> list[str]:
    """Return lines on the number of passages that each query is scored against, and why."""
    ranks = len(first.queries)
    everyone = config.loss.negatives != "local"
    seen = sum(first.passages) if everyone else max(first.passages)
    queries = sum(first.queries) if everyone else max(first.queries)
    if _alone(config):
        return [f"each query sees its record's {_passages(seen, queries)} alone: data.train has negatives: own"]
    fewest, most = min(first.queries), max(first.queries)
    count = most if fewest == most else f"{fewest} to {most}"
    origin = f"{count} {'query' if fewest == most == 1 else 'queries'} x {_passages(seen, queries)}"
    if ranks > 1:
        origin = f"{ranks} ranks x {origin}" if everyone else f"this rank's {origin}"
    negatives = f"{seen - 1} negative{'s' * (seen != 2)}"
    lines = [f"each query sees {seen} candidate{'s' * (seen != 1)}: its positive and {negatives} ({origin})"]
    if config.loss.objective in ("gte", "qwen3_embedding"):
        lines.append(
            f"loss.objective {config.loss.objective} adds scores in other directions to each softmax: `candidates` in "
            "metrics.jsonl counts them too"
        )
    tail = plan.num_examples % plan.global_batch_size
    if tail and plan.steps_per_epoch > 1 and not plan.drop_last and (plan.mixed or len(plan.sizes) == 1):
        lines.append(f"the last step of an epoch has {tail} queries, and so fewer candidates")
    if config.loss.mask_duplicates and first.duplicates:
        lines.append(
            f"masked: {first.duplicates:.1%} of the first batch's queries have their positive in it twice or more"
        )
    return lines


def warnings(config: Config, first: FirstBatch, *, l2_normalize: bool, multi_vector: bool, gpus: int) -> dict[str, str]:
    """Return advice on settings that train, but probably not as intended, by its name in `check.LEVELS`."""
    lines = {"not_used": "; ".join(idle)} if (idle := unused(config)) else {}
    if not config.loss.mask_duplicates and first.duplicates and not _alone(config):
        lines["duplicates"] = (
            f"{first.duplicates:.1%} of the queries have a duplicate of their positive in the batch, which counts as a "
            "negative: set loss.mask_duplicates to true"
        )
    if not l2_normalize and config.loss.temperature <= 0.05:
        lines["unnormalised"] = (
            f"embeddings are not normalised and loss.temperature is {config.loss.temperature}: scores will be huge; "
            "set model.l2_normalize to true, or a temperature near 1"
        )
    if multi_vector and config.loss.temperature <= 0.1:
        lines["unnormalised"] = (
            f"loss.temperature is {config.loss.temperature}, and scores are sums of up to {config.data.query_max_len} "
            "cosines, one for each token of a query: set a temperature near 1"
        )
    if config.loss.detach_remote and len(first.queries) > 1:
        lines["detached"] = (
            "loss.detach_remote biases the gradient: each passage learns from the queries of its own process only "
            "(measured: cosine 0.62 to the true gradient of a passage tower on three processes); set it to false"
        )
    if gpus > 1 and len(first.queries) == 1:
        lines["gpus"] = (
            f"{gpus} GPUs are here but one process uses one: add --nproc-per-node {gpus}, or start with torchrun"
        )
    if config.train.accumulation_steps > 1:
        lines["accumulation"] = (
            f"train.accumulation_steps {config.train.accumulation_steps} adds no negatives: set it to 1; memory stays "
            "flat, since the step is cut into micro-batches (train.micro_batch_tokens)"
        )
    if config.loss.negatives == "local" and len(first.queries) > 1:
        lines["local_negatives"] = (
            f"loss.negatives is local: {max(first.passages) - 1} of {sum(first.passages) - 1} available negatives are "
            "used; set it to gather"
        )
    budget = config.train.micro_batch_tokens
    if isinstance(budget, int) and budget >= first.tokens:
        lines["micro_batch"] = (
            f"train.micro_batch_tokens {budget} holds the whole batch ({first.tokens} tokens): cutting has no effect; "
            "lower it to save memory, or leave it at auto"
        )
    return lines


def _alone(config: Config) -> bool:
    """Return True if every query is compared with the passages of its own record alone."""
    return all(source.get("negatives") == "own" for source in config.data.sources)


def _passages(passages: int, queries: int) -> str:
    if passages == queries:
        return "1 passage"
    return (
        f"{passages // queries} passages"
        if passages % queries == 0
        else f"{passages / queries:.2f} passages on average"
    )
