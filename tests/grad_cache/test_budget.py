"""The search for the size of a micro-batch: the smallest that fills a device, in memory, the same on every rank."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch

from inbatch.grad_cache import passes
from inbatch.grad_cache.memory import FIRST_TOKENS, LEAST_TOKENS, MOST_TOKENS, Trial, fewest_tokens_that_fill
from inbatch.grad_cache.passes import Passes

GIB = 1 << 30


def device(*, launches_s: float, full_at: int, bytes_a_token: int, rows: int = 1 << 30) -> Callable[[int], Trial]:
    """A device that waits for its launches, is full from `full_at` tokens on, and has `rows` tokens to encode."""

    def attempt(tokens: int) -> Trial:
        tokens = min(tokens, rows)
        return Trial(tokens, max(launches_s, max(tokens, full_at) * 1e-6), tokens * bytes_a_token)

    return attempt


def find(attempt: Callable[[int], Trial], *, free: int = 1 << 40, max_over_ranks=lambda value: value) -> int:
    return fewest_tokens_that_fill(
        attempt, first=FIRST_TOKENS, most=MOST_TOKENS, free=free, max_over_ranks=max_over_ranks
    )


@pytest.mark.parametrize(
    ("full_at", "launches_s", "expected"),
    [
        (1, 0.0, 8192),
        (8192, 0.0, 8192),
        (8400, 0.0, 8192),
        (12000, 0.0, 16384),
        (1, 0.030, 32768),
        (1 << 20, 0.0, MOST_TOKENS),
    ],
)
def test_the_smallest_that_fills_it(full_at, launches_s, expected):
    assert find(device(launches_s=launches_s, full_at=full_at, bytes_a_token=1)) == expected


def test_memory_bounds_it():
    hungry = device(launches_s=1.0, full_at=1, bytes_a_token=GIB // 8192)
    assert find(hungry, free=16 * GIB) == 65536  # twice as many would take more than half
    assert find(hungry, free=15 * GIB) == 32768  # 65536 would take more than half, and is not tried
    assert find(hungry, free=GIB) == 4096
    assert find(hungry, free=GIB // 1000) == LEAST_TOKENS


def test_fewer_rows_than_tokens():
    assert find(device(launches_s=1.0, full_at=1, bytes_a_token=1, rows=500)) == FIRST_TOKENS


def test_all_ranks_try_the_same_and_take_the_slowest():
    barrier, told = Barrier(2), [0, 0]
    tried: list[list[int]] = [[], []]

    def rank_main(rank: int) -> int:
        def largest(value: int) -> int:
            told[rank] = value
            barrier.wait(10)
            result = max(told)
            barrier.wait(10)
            return result

        # One has hardly any rows, and would stop at once; the other is full at 16384.
        attempt = device(launches_s=0.001, full_at=16384 if rank else 1, bytes_a_token=1, rows=1 << 30 if rank else 1)
        return find(lambda tokens: tried[rank].append(tokens) or attempt(tokens), max_over_ranks=largest)

    with ThreadPoolExecutor(2) as executor:
        assert list(executor.map(rank_main, range(2))) == [16384, 16384]
    assert tried == [[8192, 16384, 32768]] * 2


def test_less_is_tried_where_memory_is_out(monkeypatch):
    tried = []

    def attempt(self, groups, tokens: int) -> Trial:
        tried.append(tokens)
        if tokens > 10000:
            raise torch.OutOfMemoryError
        return Trial(tokens, 1.0, 1)

    monkeypatch.setattr(passes, "on_cuda", lambda: True)
    monkeypatch.setattr(passes, "free_bytes", lambda modules, device: GIB)
    monkeypatch.setattr(Passes, "_attempt", attempt)
    options = {"budget": "auto", "keep_mib": 0, "multiple": 8, "packed": False, "max_over_ranks": lambda value: value}
    assert Passes(**options, sharded=False)._find_budget([], []) == 8192
    assert tried == [8192, 16384, 8192]
    with pytest.raises(torch.OutOfMemoryError, match="16384 tokens forward and backward do not fit; set"):
        Passes(**options, sharded=True)._find_budget([], [])
    monkeypatch.setattr(Passes, "_attempt", lambda *_: attempt(None, None, 1 << 20))
    with pytest.raises(torch.OutOfMemoryError, match="512 tokens forward"):
        Passes(**options, sharded=False)._find_budget([], [])


def test_graphs_are_kept_up_to_what_a_backward_needs(monkeypatch):
    options = {"budget": 100, "keep_mib": "auto", "multiple": 8, "packed": False, "max_over_ranks": lambda value: value}
    parts = [SimpleNamespace(tokens=100)] * 9
    for peak_per_token, free, fits in ((None, 500, 4), (1.05, 512, 4), (1.05, 513, 5), (1.5, 549, 4), (1.5, 550, 5)):
        found = Passes(**options, sharded=False)
        found._peak_per_token = peak_per_token
        # A graph weighs 100 bytes, and the first is there; temporaries stay free, at least an eighth of it.
        monkeypatch.setattr(passes, "free_bytes", lambda modules, device, free=free: free - 90)
        assert found._graphs_that_fit(parts, 100, [], torch.device("cuda"), 0) == (fits, 100 * fits), peak_per_token
