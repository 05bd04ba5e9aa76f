"""Which examples make up which batch: a pure function of (seed, step), so that nothing has to be saved to resume."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


def share(count: int, index: int, parts: int) -> range:
    """Return part ``index`` of ``range(count)`` cut into ``parts``: contiguous, sizes differ by at most 1."""
    return range(index * count // parts, (index + 1) * count // parts)


@dataclass(frozen=True)
class BatchPlan:
    """The global batches of a training run, in epochs that visit every example once.

    Epoch e is a permutation seeded by (seed, e), cut into ``steps_per_epoch`` batches of ``global_batch_size``; the
    last one holds what is left. Nothing depends on the number of ranks: they only share each batch out.
    Steps count from 0 over all epochs. A step costs O(batch); a new epoch O(n log n), once.
    """

    num_examples: int
    global_batch_size: int
    seed: int = 0

    def __post_init__(self):
        if self.num_examples < 1 or self.global_batch_size < 1:
            raise ValueError(
                f"BatchPlan needs at least one example and one row a batch, got num_examples={self.num_examples}, "
                f"global_batch_size={self.global_batch_size}"
            )
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_examples // self.global_batch_size)

    def epoch(self, step: int) -> int:
        """The epoch (from 0) that ``step`` belongs to."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> np.ndarray:
        """The example indices of the global batch of ``step``: int64 [G], G smaller in an epoch's last batch."""
        if step < 0:
            raise ValueError(f"steps count from 0, got {step}")
        epoch, place = divmod(step, self.steps_per_epoch)
        start = place * self.global_batch_size
        return _permutation(self.num_examples, self.seed, epoch)[start : start + self.global_batch_size].copy()


@lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    # Not Generator.permutation: numpy promises to keep the raw stream of a bit generator for ever, but not what its
    # shuffles make of it, and a run must resume after an upgrade.
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(n)
    return np.argsort(keys, kind="stable")
