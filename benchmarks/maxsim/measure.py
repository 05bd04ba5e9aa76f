"""The rows of the benchmark, and what is measured of one."""

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from inbatch import info_nce

TEMPERATURE = 1.0


def ours(queries: Tensor, passages: Tensor, query_mask: Tensor, passage_mask: Tensor) -> Tensor:
    return info_nce(
        queries, passages, query_mask=query_mask, passage_mask=passage_mask, temperature=TEMPERATURE, impl="tiled"
    )


def sentence_transformers(queries: Tensor, passages: Tensor, query_mask: Tensor, passage_mask: Tensor) -> Tensor:
    from sentence_transformers.util import maxsim

    scores = maxsim(queries, passages, query_mask, passage_mask)
    return F.cross_entropy(scores / TEMPERATURE, _targets(queries, passages))


def late_interaction_kernels(queries: Tensor, passages: Tensor, query_mask: Tensor, passage_mask: Tensor) -> Tensor:
    from late_interaction_kernels import maxsim

    scores = maxsim(queries, passages, query_mask, passage_mask)
    return F.cross_entropy(scores / TEMPERATURE, _targets(queries, passages))


def flash_maxsim(queries: Tensor, passages: Tensor, query_mask: Tensor, passage_mask: Tensor) -> Tensor:
    from flash_maxsim import flash_maxsim_batched_train

    lengths = {"query_lengths": query_mask.sum(1), "doc_lengths": passage_mask.sum(1)}
    scores = flash_maxsim_batched_train(queries, passages, **lengths)
    return F.cross_entropy(scores / TEMPERATURE, _targets(queries, passages))


def exact(queries: Tensor, passages: Tensor, query_mask: Tensor, passage_mask: Tensor) -> Tensor:
    """The loss in float64, a query at a time."""
    scores = []
    for query, mask in zip(queries.double(), query_mask, strict=True):
        grid = torch.einsum("td,msd->mts", query, passages.double())
        best = grid.masked_fill(~passage_mask[:, None], -torch.inf).max(2).values
        scores.append((best * mask).sum(1))
    return F.cross_entropy(torch.stack(scores) / TEMPERATURE, _targets(queries, passages))


def _targets(queries: Tensor, passages: Tensor) -> Tensor:
    return torch.arange(len(queries), device=queries.device) * (len(passages) // len(queries))


ROWS: dict[str, Callable[..., Tensor]] = {"inbatch": ours, "sentence-transformers": sentence_transformers}
if torch.cuda.is_available():  # their kernels need one
    PEERS = {"late_interaction_kernels": late_interaction_kernels, "flash_maxsim": flash_maxsim}
    ROWS |= {name: row for name, row in PEERS.items() if find_spec(name)}


def inputs(args: argparse.Namespace) -> list[Tensor]:
    generator, device = torch.Generator().manual_seed(0), "cuda" if torch.cuda.is_available() else "cpu"
    sides, masks = [], []
    for rows, tokens in ((args.queries, args.query_tokens), (args.passages, args.passage_tokens)):
        vectors = F.normalize(torch.randn(rows, tokens, args.dimension, generator=generator), dim=2)
        lengths = torch.randint((tokens + 1) // 2, tokens + 1, (rows,), generator=generator)
        sides.append(vectors.to(device, getattr(torch, args.dtype)).requires_grad_())
        masks.append((torch.arange(tokens) < lengths[:, None]).to(device))
    return [*sides, *masks]


def run(function: Callable[..., Tensor], given: list[Tensor]) -> tuple[Tensor, ...]:
    loss = function(*given)
    return loss.detach(), *torch.autograd.grad(loss, given[:2])


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    given = inputs(args)
    for vectors in given[:2]:
        vectors.grad = torch.zeros_like(vectors)  # counted as there beforehand
    before, seconds = _start_of_peak(), []
    for _ in range(args.repeats + 1):
        start = time.perf_counter()
        run(ROWS[name], given)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[1:]), "peak_mib": _memory() - before}


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
