"""How benchmarks/loss.py measures: a step, its time, its memory, and the plain products beside it."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

GIB = 2**30


def step(loss: Callable[[], Tensor], leaves: tuple[Tensor, Tensor]) -> Tensor:
    for leaf in leaves:
        leaf.grad = None
    value = loss()
    value.backward()
    return value


def failure(problem: Exception) -> dict:
    """A row that fails is a result, not an end."""
    words = "out of memory" if isinstance(problem, torch.OutOfMemoryError) else f"{type(problem).__name__}: {problem}"
    return {"failed": words[:200]}


def measure(loss: Callable[[], Tensor], leaves: tuple[Tensor, Tensor], timer: Callable[..., float]) -> dict:
    """The median time of a step, and its peak memory (the second step's) above what was there: gradients included."""
    for leaf in leaves:
        leaf.grad = None
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    step(loss, leaves)  # compiles
    torch.cuda.synchronize()
    for leaf in leaves:
        leaf.grad = None
    torch.cuda.reset_peak_memory_stats()
    step(loss, leaves)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    gradients = sum(leaf.nbytes for leaf in leaves)
    return {
        "ms": timer(lambda: step(loss, leaves)),
        "gib_above_inputs": (peak - before) / GIB,
        "gib_above_inputs_and_gradients": (peak - before - gradients) / GIB,
        "gib_in_all": peak / GIB,
    }


def median_ms(run: Callable[[], object], *, warm_s: float = 0.15, measure_s: float = 0.35, most: int = 1000) -> float:
    """Median of single runs in a row, the GPU warm: a short burst after a pause clocks higher than training does."""
    run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    once_s = time.perf_counter() - begin
    for _ in range(min(int(warm_s / once_s), most)):
        run()
    return _median(run, max(min(int(measure_s / once_s), most), 3))


def same_runs_ms(run: Callable[[], object]) -> float:
    """The same with as many runs on every rank."""
    for _ in range(3):
        run()
    return _median(run, 8)


def _median(run: Callable[[], object], runs: int) -> float:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def plain_products(queries: Tensor, passages: Tensor) -> dict[str, float]:
    """TFLOP/s of S, dQ and dP at this shape (at fewer rows where S would exceed 8 GiB)."""
    with torch.no_grad():
        queries = queries[: max(2**32 // len(passages), 128)]
        scores = torch.randn(len(queries), len(passages), device="cuda", dtype=torch.bfloat16)
        d_queries, d_passages = torch.empty_like(queries), torch.empty_like(passages)
        times = {
            "dQ": median_ms(lambda: torch.mm(scores, passages, out=d_queries)),
            "dP": median_ms(lambda: torch.mm(scores.T, queries, out=d_passages)),
            "S": median_ms(lambda: torch.mm(queries, passages.T, out=scores)),
        }
    return {name: 2 * scores.numel() * queries.shape[1] / ms / 1e9 for name, ms in times.items()}
