"""This rank's training batches, made ahead in a thread; which examples they hold is a function of the step alone."""

import threading
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from inbatch.data import BatchPlan, Collator, Example, TrainBatch


@dataclass(frozen=True)
class Part:
    """One accumulation part of a step: this rank's share of it, and how many of the step's queries the part has."""

    batch: TrainBatch
    share_of_step: float


def cut(rows: np.ndarray, index: int, parts: int) -> np.ndarray:
    """Part `index` of `parts`: contiguous, sizes differ by at most one, as `BatchPlan.local` cuts."""
    return rows[index * len(rows) // parts : (index + 1) * len(rows) // parts]


class Batches:
    """The parts of every step for this rank. Iterating tokenises up to `ahead` steps beforehand.

    Tokenizers keep state, so whoever tokenises in another thread meanwhile (evaluation does) holds `lock`.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        plan: BatchPlan,
        collator: Collator,
        *,
        rank: int,
        world_size: int,
        accumulation_steps: int = 1,
    ):
        self._examples, self._plan, self._collator = examples, plan, collator
        self._rank, self._world_size, self._parts = rank, world_size, accumulation_steps
        self.lock = threading.Lock()

    def step(self, step: int) -> list[Part]:
        """The parts of optimizer step `step` (from 0), those without any query on any rank left out."""
        rows, epoch = self._plan.batch(step), self._plan.epoch(step)
        parts = []
        for index in range(self._parts):
            part = cut(rows, index, self._parts)
            if len(part):
                mine = cut(part, self._rank, self._world_size)
                with self.lock:
                    batch = self._collator([self._examples[int(row)] for row in mine], epoch)
                parts.append(Part(batch, len(part) / len(rows)))
        return parts

    def ahead_from(self, first: int, last: int, ahead: int = 4) -> Generator[list[Part]]:
        """The steps first, first + 1, ..., last - 1 in order. An error in the thread is raised here."""
        pending: deque = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="inbatch-batches") as thread:
            try:
                for step in range(first, last):
                    pending.append(thread.submit(self.step, step))
                    if len(pending) > ahead:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()
