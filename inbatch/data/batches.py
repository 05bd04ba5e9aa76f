"""This rank's training batches, made ahead by worker processes; their content is a function of the step alone."""

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from inbatch.data import Collator, Example, TrainBatch
from inbatch.data.collator import collate
from inbatch.data.plan import Mixture, share

_MASK = "attention_mask"
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2): the signal that comes when the parent ends


@dataclass(frozen=True)
class Part:
    """One accumulation part of a step: this rank's share of it, and how many of the step's queries the part has."""

    batch: TrainBatch
    share_of_step: float


class Batches(Dataset):
    """The parts of every step for this rank."""

    def __init__(
        self,
        examples: Sequence[Example],
        plan: Mixture,
        collator: Collator | Sequence[Collator],
        *,
        rank: int,
        world_size: int,
        accumulation_steps: int = 1,
    ):
        self._examples, self._plan = examples, plan
        self._collators = collator if isinstance(collator, Sequence) else [collator]  # by source
        self._rank, self._world_size, self._parts = rank, world_size, accumulation_steps

    def step(self, step: int) -> list[Part]:
        """Return the parts of optimizer step `step` (from 0), those without any query on any rank left out."""
        rows = self._plan.rows(step)
        size, parts = len(rows.examples), []
        sources = [self._collators[source] for source in np.unique(rows.sources)]  # the same on every rank
        for index in range(self._parts):
            part = share(size, index, self._parts)
            if len(part):
                mine = [part[place] for place in share(len(part), self._rank, self._world_size)]
                drawn = [
                    (self._collators[rows.sources[row]], self._examples[int(rows.examples[row])], int(rows.passes[row]))
                    for row in mine
                ]
                parts.append(Part(collate(drawn, sources), len(part) / size))
        return parts

    def ahead_from(self, first: int, last: int, *, num_workers: int | None = None) -> Generator[list[Part]]:
        """Yield the steps first, first + 1, ..., last - 1 in order, each worker two steps ahead; None: as cores allow.

        Closing it, or an error in it, ends the workers.
        Processes, not threads: a tokenizer that holds the interpreter keeps the GPU waiting for its next kernel.
        """
        options: dict[str, Any] = {}
        num_workers = _workers_that_fit() if num_workers is None else num_workers
        if num_workers:
            # Forked, so that nothing is opened twice. Before the first text is tokenised here: tokenizers would switch
            # their own threads off in the workers, with a warning.
            options = {"num_workers": num_workers, "prefetch_factor": 2, "multiprocessing_context": "fork"}
            options["worker_init_fn"] = start_worker
        loader = DataLoader(
            self, sampler=range(first, last), batch_size=None, collate_fn=lambda parts: parts, **options
        )
        others = set(multiprocessing.active_children())
        loaded = iter(loader)
        for worker in set(multiprocessing.active_children()) - others:
            # An iterator that outlives its use, as in an exception's traceback, keeps its workers. They ignore
            # SIGTERM, by which multiprocessing ends them, and it would wait for ever.
            atexit.register(worker.kill)
        return _received_ahead(loaded) if num_workers else (_unpacked(step) for step in loaded)

    def __getitem__(self, step: int) -> list[tuple[dict, float]] | Exception:
        """Return what travels from a worker: the parts, or an error, which the loader would wrap in its traceback."""
        try:
            return [(_packed(vars(part.batch)), part.share_of_step) for part in self.step(step)]
        except Exception as error:
            return error


def start_worker(number: int) -> None:
    """Give a worker one thread and low priority: the process that launches kernels comes first."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.nice(10)
    # Schedulers signal every process of a job; the rank needs its batches for as long as it goes on.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # Without this, a worker that waits at a full pipe outlives a rank that is killed.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)


def _received_ahead(loaded: Any) -> Generator[list[Part]]:
    """Yield the steps, each received while the one before runs: megabytes come through a worker's pipe."""
    steps = map(_unpacked, loaded)
    with ThreadPoolExecutor(1) as receiver:
        try:
            coming = receiver.submit(next, steps, None)
            while (parts := coming.result()) is not None:
                coming = receiver.submit(next, steps, None)
                yield parts
        finally:
            # Left to the garbage collector, the queues may be closed first: then it waits 20 s, and workers stay.
            loaded._shutdown_workers()


def _workers_that_fit() -> int:
    """Return one worker less than there are cores for this rank, from 1 to 8."""
    cores_per_rank = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(8, max(1, cores_per_rank - 1))


def _packed(tensors: dict[str, Any]) -> dict[str, Any]:
    """Return arrays: tensors would travel through shared memory, of which containers often have too little."""
    return {
        name: {key: tokens.numpy().astype(bool if key == _MASK else np.int32) for key, tokens in value.items()}
        if isinstance(value, dict)
        else value.numpy()
        for name, value in tensors.items()
        if value is not None
    }


def _unpacked(parts: list[tuple[dict, float]] | Exception) -> list[Part]:
    if isinstance(parts, Exception):
        raise parts
    return [
        Part(TrainBatch(**{name: _tensors(value) for name, value in arrays.items()}), share) for arrays, share in parts
    ]


def _tensors(value: dict[str, np.ndarray] | np.ndarray) -> Any:
    if isinstance(value, dict):
        return {
            key: torch.from_numpy(tokens if key == _MASK else tokens.astype(np.int64)) for key, tokens in value.items()
        }
    return torch.from_numpy(value)
