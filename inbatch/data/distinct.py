"""Batches in which no two examples share a key: a query or a positive, by text or by id.

Shapes: G rows of a batch, R rows looked at, F keys of those rows, one after the other.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_AHEAD = 2  # batches of rows that wait, looked at for a batch: bounds the time where a key has very many rows


@dataclass(frozen=True, eq=False)
class Keys:
    """The keys of n examples: those of example i are ``keys[offsets[i] : offsets[i + 1]]``, int64 both."""

    offsets: np.ndarray
    keys: np.ndarray

    def of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the keys of some rows, and of each key the place of its row among them: int64 [F] both."""
        starts = self.offsets[rows]
        counts = self.offsets[rows + 1] - starts
        places_F = np.repeat(np.arange(len(rows)), counts)
        before = np.cumsum(counts) - counts
        return self.keys[np.repeat(starts - before, counts) + np.arange(len(places_F))], places_F


class Shuffled:
    """A permutation of range(n), a function of (n, seed, epoch), of which a slice costs less than the whole.

    It orders the examples by random numbers. Those whose numbers begin with the same bits are sorted when they are
    asked for: 10 million take a second to sort, and the first batch of an epoch needs a few.
    """

    def __init__(self, n: int, seed: int, epoch: int):
        # Not Generator.permutation: numpy promises to keep the raw stream of a bit generator for ever, but not what its
        # shuffles make of it, and a run must resume after an upgrade.
        self._numbers = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(n)
        bits = min(15, max(0, (n >> 17).bit_length()))
        self._parts = (self._numbers >> np.uint64(64 - bits)).astype(np.int16) if bits else np.zeros(n, np.int16)
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(self._parts, minlength=1 << bits))])
        self._sorted = lru_cache(maxsize=2)(self._sort)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, some: slice) -> np.ndarray:
        start, stop, _ = some.indices(len(self))
        low, high = np.searchsorted(self._starts, [start, stop], side="right") - 1
        parts = [self._sorted(part) for part in range(low, min(high + 1, len(self._starts) - 1))]
        first = int(self._starts[low])
        return np.concatenate([np.empty(0, np.int64), *parts])[start - first : stop - first]

    def _sort(self, part: int) -> np.ndarray:
        rows = np.flatnonzero(self._parts == part)
        return rows[np.argsort(self._numbers[rows], kind="stable")]


class DistinctBatches:
    """The batches of one epoch, made one after the other from its examples in ``order``.

    A batch takes each example in turn that shares no key with those taken already: first of those that wait (two
    batches of them at most), then of the order; when the order is at its end, of all that wait. Whatever is passed over
    waits for the next batch. So a batch is a function of the order, and the last ones may be smaller.
    """

    def __init__(self, keys: Keys, order: "np.ndarray | Shuffled", size: int):
        self._keys, self._order, self._size = keys, order, size
        self._next, self._waiting = 0, order[:0]
        self._made: list[np.ndarray] = []

    def batch(self, place: int) -> np.ndarray:
        """Return the examples of a batch, int64 [G]."""
        while len(self._made) <= place:
            self._made.append(self._make())
        return self._made[place].copy()

    def left_out(self, batches: int) -> int:
        """Return how many examples are in none of the first ``batches``."""
        self.batch(batches - 1)
        return len(self._order) - sum(map(len, self._made[:batches]))

    def _make(self) -> np.ndarray:
        taken, used = [self._order[:0]], self._keys.keys[:0]
        passed: dict[bool, list[np.ndarray]] = {True: [], False: []}  # of those that waited, of the order
        seen, need = 0, self._size
        while need:
            ended = self._next == len(self._order)
            most = len(self._waiting) if ended else min(len(self._waiting), _AHEAD * self._size)
            waited = seen < most
            if waited:
                some = self._waiting[seen : min(most, seen + self._size)]
            elif not ended:
                some = self._order[self._next : self._next + max(need + need // 4, 1024)]
            else:
                break
            keys_F, places_F = self._keys.of(some)
            chosen = np.flatnonzero(_first_come(keys_F, places_F, len(some), used))[:need]
            looked_at = int(chosen[-1]) + 1 if len(chosen) == need else len(some)
            taken.append(some[chosen])
            used = np.concatenate([used, keys_F[np.isin(places_F, chosen)]])
            passed[waited].append(np.delete(some[:looked_at], chosen))
            need -= len(chosen)
            if waited:
                seen += looked_at
            else:
                self._next += looked_at
        self._waiting = np.concatenate([*passed[True], self._waiting[seen:], *passed[False]])
        return np.concatenate(taken)


def _first_come(keys_F: np.ndarray, places_F: np.ndarray, rows: int, used: np.ndarray) -> np.ndarray:
    """Return bool [R]: rows that share no key with `used` nor with a row chosen before them.

    In rounds: a row that is the first undecided one for all its keys is chosen, and those that share a key with it are
    not. Most rows are decided in the first.
    """
    undecided, chosen = np.ones(rows, bool), np.zeros(rows, bool)
    undecided[places_F[np.isin(keys_F, used)]] = False
    distinct, codes_F = np.unique(keys_F, return_inverse=True)
    while undecided.any():
        live = undecided[places_F]
        codes, places = codes_F[live], places_F[live]
        first = np.empty(len(distinct), np.int64)
        first[codes[::-1]] = places[::-1]  # of equal codes the last one written stays: the first row
        now = undecided.copy()
        now[places[first[codes] != places]] = False
        chosen |= now
        taken = np.zeros(len(distinct), bool)
        taken[codes_F[now[places_F]]] = True
        undecided &= ~now
        undecided[places_F[taken[codes_F]]] = False
    return chosen
