"""The plan of batches: a pure function of (seed, step), so that nothing has to be saved to resume.

Shapes: G rows of a global batch, S sources.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from inbatch.data.distinct import DistinctBatches, Keys, Shuffled


def share(count: int, index: int, parts: int) -> range:
    """Return part ``index`` of ``range(count)`` cut into ``parts``: contiguous, sizes differ by at most 1."""
    return range(index * count // parts, (index + 1) * count // parts)


def _batches(rows: int, size: int, drop_last: bool) -> int:
    """Return the batches in an epoch; ValueError where none is full and the last is left out."""
    if drop_last and rows < size:
        raise ValueError(f"{rows} examples fill no batch of {size}: lower global_batch_size, or set drop_last to false")
    return rows // size if drop_last else -(-rows // size)


@dataclass(frozen=True, eq=False)
class Groups:
    """The number of each example's group, from 0 on: int32 [n]. Examples of a group follow one another in an epoch."""

    of: np.ndarray

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Return the examples, int64 [n], group after group in an order seeded by (seed, epoch)."""
        places = np.argsort(Shuffled(int(self.of.max()) + 1, seed, epoch)[:])
        return np.argsort(places[self.of], kind="stable")


class BatchRows(NamedTuple):
    """The rows of a global batch, int64 [G]: examples (over all sources), their sources, how often each was read."""

    examples: np.ndarray
    sources: np.ndarray
    passes: np.ndarray


@dataclass(frozen=True)
class BatchPlan:
    """The global batches of a training run, in epochs that visit every example once.

    Epoch e is a permutation seeded by (seed, e), of the groups if ``groups`` are given, cut into ``steps_per_epoch``
    batches of ``global_batch_size``; the last one holds what is left. Nothing depends on the number of ranks: they only
    share each batch out.
    Steps count from 0 over all epochs. A step costs O(batch); a new epoch O(n), once.
    shuffle: False keeps the order of the examples. drop_last: leaves out a last batch that is not full. keys: no two
    rows of a batch share one (see ``DistinctBatches``); a step then costs what those of the epoch before it do, once.
    """

    num_examples: int
    global_batch_size: int
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = False
    keys: Keys | None = None
    groups: Groups | None = None

    def __post_init__(self):
        if self.num_examples < 1 or self.global_batch_size < 1:
            raise ValueError(
                f"BatchPlan needs at least one example and one row a batch, got num_examples={self.num_examples}, "
                f"global_batch_size={self.global_batch_size}"
            )
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")
        _ = self.steps_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        return _batches(self.num_examples, self.global_batch_size, self.drop_last)

    def epoch(self, step: int) -> int:
        """Return the epoch (from 0) that ``step`` belongs to."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> np.ndarray:
        """Return the example indices of the global batch of ``step``: int64 [G], G smaller in an epoch's last batch."""
        if step < 0:
            raise ValueError(f"steps count from 0, got {step}")
        epoch, place = divmod(step, self.steps_per_epoch)
        if self.keys is not None:
            return self._distinct(epoch).batch(place)
        start = place * self.global_batch_size
        return self._order(epoch)[start : start + self.global_batch_size].copy()

    def left_out(self, step: int) -> int:
        """Return how many examples of the epoch that ends with ``step`` no batch had room for; 0 for other steps."""
        epoch, place = divmod(step + 1, self.steps_per_epoch)
        return self._distinct(epoch - 1).left_out(self.steps_per_epoch) if self.keys is not None and place == 0 else 0

    # Two epochs are remembered: a run may be between them.

    @cached_property
    def _order(self) -> Callable[[int], Shuffled | np.ndarray]:
        return lru_cache(maxsize=2)(self._ordered)

    @cached_property
    def _distinct(self) -> Callable[[int], DistinctBatches]:
        keys, size = self.keys, self.global_batch_size
        assert keys is not None
        return lru_cache(maxsize=2)(lambda epoch: DistinctBatches(keys, self._order(epoch), size))

    def _ordered(self, epoch: int) -> Shuffled | np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_examples)
        if self.groups is not None:
            return self.groups.order(self.seed, epoch)
        return Shuffled(self.num_examples, self.seed, epoch)


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The global batches of a run over several sources, of ``sizes`` examples.

    Every batch comes from one source, or with ``mixed`` its rows are drawn from all. Each source is read in passes,
    as ``BatchPlan`` does. An epoch has the steps of one pass over all sources; ``weights`` (None: one pass
    each) are the sources' shares of its batches (of its rows if mixed), kept over the run to within one.
    """

    sizes: tuple[int, ...]
    global_batch_size: int
    seed: int = 0
    weights: tuple[float, ...] | None = None
    mixed: bool = False
    shuffle: bool = True
    drop_last: bool = False
    keys: tuple[Keys, ...] | None = None
    groups: tuple[Groups | None, ...] | None = None

    def __post_init__(self):
        assert len(self.sizes) > 0
        assert self.keys is None or not self.mixed
        _ = self.steps_per_epoch
        if self.weights is not None and (len(self.weights) != len(self.sizes) or min(self.weights) <= 0):
            raise ValueError(f"weights must be {len(self.sizes)} positive numbers, one a source, got {self.weights}")

    @cached_property
    def plans(self) -> list[BatchPlan]:
        """Return the passes over each source, by what is drawn at once: a batch, or if ``mixed`` an example."""
        drawn = 1 if self.mixed else self.global_batch_size
        options = {"shuffle": self.shuffle, "drop_last": self.drop_last}
        none = (None,) * len(self.sizes)
        keys, groups = self.keys or none, self.groups or none
        return [
            BatchPlan(size, drawn, self.seed + source, **options, keys=keys[source], groups=groups[source])
            for source, size in enumerate(self.sizes)
        ]

    @property
    def num_examples(self) -> int:
        return sum(self.sizes)

    @property
    def draws_per_epoch(self) -> int:
        """Return how many batches (if mixed, examples) an epoch draws."""
        return sum(plan.steps_per_epoch for plan in self.plans)

    @property
    def steps_per_epoch(self) -> int:
        return (
            _batches(self.draws_per_epoch, self.global_batch_size, self.drop_last)
            if self.mixed
            else self.draws_per_epoch
        )

    def epoch(self, step: int) -> int:
        """Return the epoch (from 0) that ``step`` belongs to."""
        return step // self.steps_per_epoch

    def draws(self, epoch: int) -> np.ndarray:
        """Return how many batches (if mixed, examples) the epoch draws of each source: int64 [S]."""
        return _apportioned(self._shares(), self.draws_per_epoch, epoch)[1]

    def batch(self, step: int) -> np.ndarray:
        """Return the example indices of the global batch of ``step``, counted over all sources: int64 [G]."""
        return self.rows(step).examples

    def rows(self, step: int) -> BatchRows:
        """Return the rows of the global batch of ``step``."""
        plans, first = self.plans, np.cumsum([0, *self.sizes])
        parts = []
        for source, draw in self._drawn(step):
            examples = plans[source].batch(draw)
            passes = np.full_like(examples, plans[source].epoch(draw))
            parts.append((examples + first[source], np.full_like(examples, source), passes))
        return BatchRows(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    def left_out(self, step: int) -> int:
        """Return how many examples of a source the pass over it that ends with ``step`` had no room for."""
        if self.keys is None:
            return 0
        ((source, draw),) = self._drawn(step)
        return self.plans[source].left_out(draw)

    def _drawn(self, step: int) -> list[tuple[int, int]]:
        """Return the source of each draw of a step, and how many of that source came before it in the run."""
        if step < 0:
            raise ValueError(f"steps count from 0, got {step}")
        epoch, place = divmod(step, self.steps_per_epoch)
        sources, draws = _order(self._shares(), self.draws_per_epoch, self.seed if self.shuffle else None, epoch)
        width = self.global_batch_size if self.mixed else 1
        chosen = slice(place * width, (place + 1) * width)
        return list(zip(sources[chosen].tolist(), draws[chosen].tolist(), strict=True))

    def _shares(self) -> tuple[float, ...]:
        weights = self.weights or tuple(plan.steps_per_epoch for plan in self.plans)
        return tuple(weight / sum(weights) for weight in weights)


@lru_cache(maxsize=4)
def _apportioned(shares: tuple[float, ...], number: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return how many of `number` draws an epoch each source had before `epoch`, and has in it: int64 [S] each."""
    before = in_epoch = np.zeros(len(shares), np.int64)
    for k in range(epoch + 1):
        before = before + in_epoch
        due = np.array(shares) * number * (k + 1) - before
        in_epoch = np.floor(due).clip(0).astype(np.int64)
        while (missing := number - in_epoch.sum()) != 0:  # a step for each source at most
            behind = due - in_epoch
            if missing > 0:
                in_epoch[behind.argmax()] += 1
            else:
                in_epoch[np.where(in_epoch > 0, behind, np.inf).argmin()] -= 1
    return before, in_epoch


@lru_cache(maxsize=2)
def _order(shares: tuple[float, ...], number: int, seed: int | None, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the source of every draw of an epoch, and how many of that source came before it in the run.

    seed: None draws from one source after the other.
    """
    before, in_epoch = _apportioned(shares, number, epoch)
    sources = np.repeat(np.arange(len(shares)), in_epoch)
    draws = np.concatenate([np.arange(a, a + n) for a, n in zip(before.tolist(), in_epoch.tolist(), strict=True)])
    if seed is None:
        return sources, draws
    # Where each draw goes is chance; the draws of one source stay in order.
    places = Shuffled(number, seed, epoch)[:]
    ordered = np.empty_like(sources)
    ordered[places] = sources
    result = np.empty_like(draws)
    result[np.argsort(ordered, kind="stable")] = draws
    return ordered, result
