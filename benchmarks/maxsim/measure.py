"""The rows of the benchmark, and what is measured of one."""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inbatch import info_nce

TEMPERATURE = 1.0


def ours(queries: Tensor, passages: Tensor, query_mask: Tensor, passage_mask: Tensor, *, impl: str) -> Tensor:
    return info_nce(
        queries, passages, query_mask=query_mask, passage_mask=passage_mask, temperature=TEMPERATURE, impl=impl
    )


def scored_by(scores: Callable[..., Tensor], *given: Tensor) -> Tensor:
    return F.cross_entropy(scores(*given) / TEMPERATURE, _targets(*given[:2]))


def sentence_transformers(queries: Tensor, passages: Tensor, query_mask: Tensor, passage_mask: Tensor) -> Tensor:
    from sentence_transformers.util import maxsim

    return maxsim(queries, passages, query_mask, passage_mask)


def late_interaction_kernels(queries: Tensor, passages: Tensor, query_mask: Tensor, passage_mask: Tensor) -> Tensor:
    from late_interaction_kernels import maxsim

    return maxsim(queries, passages, query_mask, passage_mask)


def flash_maxsim(queries: Tensor, passages: Tensor, query_mask: Tensor, passage_mask: Tensor) -> Tensor:
    from flash_maxsim import flash_maxsim_batched_train

    lengths = {"query_lengths": query_mask.sum(1), "doc_lengths": passage_mask.sum(1)}
    return flash_maxsim_batched_train(queries, passages, **lengths)


def formula(queries: Tensor, passages: Tensor, query_mask: Tensor, passage_mask: Tensor) -> Tensor:
    """As PyLate and most others write it: the whole grid, its maximum, its sum."""
    grid = torch.einsum("btd,csd->bcts", queries, passages).masked_fill(~passage_mask[:, None], -torch.inf)
    return (grid.max(3).values.float() * query_mask[:, None]).sum(2)


def exact(queries: Tensor, passages: Tensor, query_mask: Tensor, passage_mask: Tensor) -> Tensor:
    """The scores in float64, a query at a time."""
    scores = []
    for query, mask in zip(queries.double(), query_mask, strict=True):
        grid = torch.einsum("td,msd->mts", query, passages.double())
        best = grid.masked_fill(~passage_mask[:, None], -torch.inf).max(2).values
        scores.append((best * mask).sum(1))
    return torch.stack(scores)


def _targets(queries: Tensor, passages: Tensor) -> Tensor:
    return torch.arange(len(queries), device=queries.device) * (len(passages) // len(queries))


ROWS: dict[str, Callable[..., Tensor]] = {"inbatch tiled": partial(ours, impl="tiled")}
if torch.cuda.is_available():  # kernels need one
    ROWS = {"inbatch fused": partial(ours, impl="fused")} | ROWS
    PEERS = {"late_interaction_kernels": late_interaction_kernels, "flash_maxsim": flash_maxsim}
    ROWS |= {name: partial(scored_by, row) for name, row in PEERS.items() if find_spec(name)}
if find_spec("sentence_transformers"):
    ROWS["sentence-transformers"] = partial(scored_by, sentence_transformers)
ROWS["formula, eager"] = partial(scored_by, formula)
if torch.cuda.is_available():
    ROWS["formula, compiled"] = partial(scored_by, torch.compile(formula))


def grid_mib(shape: list[int]) -> float:
    return math.prod(shape) * 4 / 2**20


def inputs(shape: list[int], args: argparse.Namespace) -> list[Tensor]:
    generator, device = torch.Generator().manual_seed(0), "cuda" if torch.cuda.is_available() else "cpu"
    sides, masks = [], []
    for rows, tokens in (shape[::2], shape[1::2]):
        vectors = F.normalize(torch.randn(rows, tokens, args.dimension, generator=generator), dim=2)
        lengths = torch.randint((tokens + 1) // 2, tokens + 1, (rows,), generator=generator)
        sides.append(vectors.to(device, getattr(torch, args.dtype)).requires_grad_())
        masks.append((torch.arange(tokens) < lengths[:, None]).to(device))
    return [*sides, *masks]


def run(function: Callable[..., Tensor], given: list[Tensor]) -> tuple[Tensor, ...]:
    loss = function(*given)
    return loss.detach(), *torch.autograd.grad(loss, given[:2])


def check(name: str, shape: list[int], args: argparse.Namespace) -> dict[str, float | bool]:
    """Return the error against float64 on a few texts, and whether the whole shape gives the same bits twice."""
    rows = max(divisor for divisor in (1, 2, 4, 8) if divisor <= shape[0])
    given = inputs([rows, 16, *shape[2:]], args)
    pairs = zip(run(ROWS[name], given), run(partial(scored_by, exact), given), strict=True)
    error = max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)
    given = inputs(shape, args)
    twice = zip(run(ROWS[name], given), run(ROWS[name], given), strict=True)
    return {"largest_error": float(f"{error:.1e}"), "repeats": all(torch.equal(a, b) for a, b in twice)}


def measure(name: str, shape: list[int], args: argparse.Namespace) -> dict[str, float]:
    given = inputs(shape, args)
    gradients_mib = sum(vectors.nbytes for vectors in given[:2]) / 2**20
    run(ROWS[name], given)
    before, total, host = _start_of_peak(), [], []
    for _ in range(args.repeats):
        start = time.perf_counter()
        run(ROWS[name], given)
        host.append(time.perf_counter() - start)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        total.append(time.perf_counter() - start)
    peak_mib = _memory() - before - gradients_mib
    return {
        "ms": round(1000 * statistics.median(total), 3), "host_ms": round(1000 * statistics.median(host), 3),
        "peak_mib": round(peak_mib, 1), "grids": round(peak_mib / grid_mib(shape), 4),
    }  # fmt: skip


def sweep(shape: list[int], args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Time our kernels alone, with the tiles in use and others; yield the settings, what they are of, and ms."""
    from inbatch.losses.max_sim import in_place, packed, read_spans
    from inbatch.losses.triton import launch, max_sim

    queries, passages, query_mask, passage_mask = inputs(shape, args)
    spans, _ = read_spans({"queries": (queries, query_mask), "passages": (passages, passage_mask)}, fused=True)
    of_queries, of_passages = packed(queries.detach(), spans[0]), in_place(passages.detach(), spans[1])
    assert of_passages.starts is not None
    texts = of_passages.vectors, of_passages.lengths, of_passages.starts
    d_scores = torch.randn(shape[0], shape[1], device=queries.device)

    def grid() -> max_sim.FusedGrid:
        return max_sim.FusedGrid(of_queries.vectors, of_queries.lengths, False, None, shape[3])

    _, places = grid().scores(*texts)
    d_queries = torch.zeros_like(of_queries.vectors, dtype=torch.float32)
    calls = {
        "forward": lambda: grid().scores(*texts),
        "backward": lambda: grid().add_gradients(d_scores, *texts, places, d_queries, passages.dtype),
    }
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for call in calls.values():
                call()
            torch.cuda.synchronize()
        for event in sorted(profile.key_averages(), key=lambda event: -event.device_time_total)[:10]:
            yield {"kernel": event.key[:60], "calls": event.count, "ms": round(event.device_time_total / 1000, 4)}
    except Exception as error:
        yield {"profile": f"{type(error).__name__}: {error}"[:300]}
    default = dict(max_sim.TILES)
    for kernel, others in OTHER_TILES.items():
        part, choices = "forward" if kernel == "half" else "backward", default[kernel]
        for choice in [choices, *others]:
            max_sim.TILES[kernel] = choices | choice
            launch._launchable.clear()  # it looks kernels up by their arguments alone
            line: dict[str, object] = {"sweep": kernel, "part": part, **choices, **choice}
            try:
                line["ms"] = round(_device_ms(calls[part]), 4)
            except Exception as error:
                line["error"] = f"{type(error).__name__}: {error}"[:300]
            yield line
        max_sim.TILES[kernel] = default[kernel]
        launch._launchable.clear()


OTHER_TILES: dict[str, list[dict[str, Any]]] = {
    "half": [
        {"num_stages": 2}, {"num_warps": 8}, {"BM": 64}, {"BN": 32}, {"GROUP": 16},
        {"BN": 128, "num_warps": 8, "num_stages": 2}, {"BM": 256, "num_warps": 8, "num_stages": 2},
    ],
    "queries": [{"BC": 8}, {"BC": 32, "num_warps": 2}],
    "order": [{"BLOCK": 1024}, {"BLOCK": 1024, "num_warps": 4}, {"BLOCK": 4096}, {"BLOCK": 4096, "num_warps": 16}],
    "passages": [{"BK": 8}, {"BK": 32, "num_warps": 2}],
}  # fmt: skip


def _device_ms(call: Callable[[], object], times: int = 10) -> float:
    call()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(times):
        call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / times


def _memory() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10


def _start_of_peak() -> float:
    """Forget the peak so far; return what is in use."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    return _memory()
