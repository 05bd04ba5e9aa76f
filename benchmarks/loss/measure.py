"""How benchmarks.loss measures: a step, its time, its memory, and the plain products beside it."""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import subprocess
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


def memory(loss: Callable[[], Tensor], leaves: tuple[Tensor, Tensor]) -> dict[str, float]:
    """The peak memory of a step (the second: the first compiles) above what was there: gradients included."""
    for leaf in leaves:
        leaf.grad = None
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    step(loss, leaves)
    torch.cuda.synchronize()
    for leaf in leaves:
        leaf.grad = None
    torch.cuda.reset_peak_memory_stats()
    step(loss, leaves)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    gradients = sum(leaf.nbytes for leaf in leaves)
    for leaf in leaves:
        leaf.grad = None
    return {
        "gib_above_inputs": (peak - before) / GIB,
        "gib_above_inputs_and_gradients": (peak - before - gradients) / GIB,
        "gib_in_all": peak / GIB,
    }


def in_turns(runs: dict[str, Callable[[], object]], agree: Callable[[float], float] = float) -> dict[str, float]:
    """Median milliseconds of each. They take turns, there and back, so that a slow spell of the host meets all alike.

    A turn warms up before it is timed, and where the GPU is what takes the time, long enough for its clock to settle:
    after lighter work it clocks higher for a while. `agree` makes one number of the ranks' durations, that all may run
    as often.
    """
    once_s = {}
    for name, run in runs.items():
        run()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        once_s[name] = agree(time.perf_counter() - begin)
    heavy = max(once_s.values()) > 0.005
    rounds, warm_s, turn_s = (2, 0.2, 0.2) if heavy else (10, 0.02, 0.04)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs) if number % 2 == 0 else reversed(runs):
            for _ in range(math.ceil(warm_s / once_s[name])):
                runs[name]()
            times[name] += _intervals_ms(runs[name], math.ceil(turn_s / once_s[name]))
    return {name: statistics.median(each) for name, each in times.items()}


def _intervals_ms(run: Callable[[], object], runs: int) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


def busy_ms(run: Callable[[], object], runs: int = 10) -> float:
    """How long the GPU itself works for one run. After a profile every launch takes longer: measure times first."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(runs):
            run()
        torch.cuda.synchronize()
    return sum(each.self_device_time_total for each in profile.key_averages()) / runs / 1000


def card_under(run: Callable[[], object]) -> dict[str, str]:
    """What nvidia-smi says of the card while it does nothing but this; empty where there is no nvidia-smi."""
    fields = "power.draw.instant,power.limit,clocks.sm,clocks.max.sm,clocks_event_reasons.sw_power_cap"
    uuid = f"GPU-{torch.cuda.get_device_properties().uuid}"
    command = ["nvidia-smi", "-i", uuid, f"--query-gpu={fields}", "--format=csv,noheader"]
    end = time.perf_counter() + 1
    while time.perf_counter() < end:
        run()
        torch.cuda.synchronize()
    try:
        query = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    except FileNotFoundError:
        return {}
    while query.poll() is None:
        run()
        torch.cuda.synchronize()
    return dict(zip(fields.split(","), (value.strip() for value in query.communicate()[0].split(",")), strict=False))


def plain_products(queries: Tensor, passages: Tensor) -> tuple[dict[str, Callable[[], object]], float]:
    """The plain products S, dQ and dP of this shape (fewer rows where S would exceed 8 GiB), and their operations."""
    queries, passages = queries.detach()[: max(2**32 // len(passages), 128)], passages.detach()
    scores = torch.randn(len(queries), len(passages), device="cuda", dtype=torch.bfloat16)
    d_queries, d_passages, out = torch.empty_like(queries), torch.empty_like(passages), torch.empty_like(scores)
    products = {
        "dQ": lambda: torch.mm(scores, passages, out=d_queries),
        "dP": lambda: torch.mm(scores.T, queries, out=d_passages),
        "S": lambda: torch.mm(queries, passages.T, out=out),
    }
    return products, 2 * scores.numel() * queries.shape[1]
