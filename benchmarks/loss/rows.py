"""What benchmarks.loss compares: the rows, the data, and the truth in float64.

Shapes: B queries, N passages, D dimension.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from inbatch import FalseNegatives, info_nce

Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # (queries, passages, targets, temperature) -> 0-d


@dataclass(frozen=True)
class Row:
    """largest: the most scores it is asked for, for want of memory; everywhere: not at the main shape alone."""

    name: str
    loss: Loss
    largest: float = math.inf
    everywhere: bool = True


def eager(queries: Tensor, passages: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """As NeMo AutoModel and sentence-transformers have it: scores in the inputs' dtype, cross-entropy in float32."""
    return F.cross_entropy((queries @ passages.T / temperature).float(), targets)


def float32_scores(queries: Tensor, passages: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Scores widened before they are divided. The product itself still rounds to the inputs' dtype."""
    return F.cross_entropy((queries @ passages.T).float() / temperature, targets)


def float32_products(queries: Tensor, passages: Tensor, targets: Tensor, temperature: float) -> Tensor:
    return F.cross_entropy(queries.float() @ passages.float().T / temperature, targets)


def ours(chunk_mib: float | None = None) -> Loss:
    return lambda q, p, y, t: info_nce(q, p, temperature=t, chunk_mib=chunk_mib)


def ours_with_ids(q: Tensor, p: Tensor, y: Tensor, t: float) -> Tensor:
    """Every passage has an id of its own: all pairs are compared, none is masked, and the loss is the same."""
    return info_nce(q, p, temperature=t, false_negatives=FalseNegatives(_ids(len(p))))


@lru_cache(maxsize=1)
def _ids(N: int) -> Tensor:
    return torch.arange(N, device="cuda") * 7919


def rows() -> list[Row]:
    compiled, compiled_float32 = (torch.compile(each, dynamic=False) for each in (eager, float32_scores))
    found = [
        Row("inbatch", ours()),
        Row("inbatch, passage ids compared", ours_with_ids),
        Row("inbatch, 600 MiB chunks", ours(chunk_mib=600), everywhere=False),
        Row("torch.compile, float32 scores", lambda *inputs: compiled_float32(*inputs), largest=2**34),
        Row("torch.compile", lambda *inputs: compiled(*inputs), largest=2**34, everywhere=False),
        Row("eager", eager, largest=2**32),
        Row("eager, float32 products", float32_products, largest=2**27),
    ]
    peers = {"liger-kernel": _liger, "cut-cross-entropy": _cce, "inf-cl": _inf_cl, "quack-kernels": _quack}
    for package, make in peers.items():
        try:
            found += make()
        except ImportError:
            print(f"{package} is not installed: no row", file=sys.stderr)
    return found


def _liger() -> list[Row]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return [Row("Liger fused linear CE", lambda q, p, y, t: loss(p, q * (1 / t), y), everywhere=False)]


def _cce() -> list[Row]:
    from cut_cross_entropy import linear_cross_entropy

    def exact(q: Tensor, p: Tensor, y: Tensor, t: float) -> Tensor:
        return linear_cross_entropy(q * (1 / t), p, y, filter_eps=None)

    return [
        Row("CCE", lambda q, p, y, t: linear_cross_entropy(q * (1 / t), p, y), everywhere=False),
        Row("CCE, filter off", exact, everywhere=False),
    ]


def _inf_cl() -> list[Row]:
    from inf_cl import cal_flash_loss

    def loss(q: Tensor, p: Tensor, y: Tensor, t: float) -> Tensor:
        return cal_flash_loss(q, p, labels=y, scale=torch.tensor(1 / t, device=q.device)).mean()

    return [Row("Inf-CL", loss, everywhere=False)]


def _quack() -> list[Row]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def loss(q: Tensor, p: Tensor, y: Tensor, t: float) -> Tensor:
        return chunked_linear_cross_entropy(q * (1 / t), p, y, chunk_size=8192)

    return [Row("quack, 8192 rows a chunk", loss, largest=2**34)]


def pairs(B: int, N: int, D: int, seed: int = 0, signal: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated bfloat16 unit vectors, as an encoder gives them: any two share 0.6, a pair 0.4 * signal more.

    Returns queries, passages (both leaves that require grad) and the queries' targets, the first of each group.
    """
    generator = torch.Generator(device="cuda").manual_seed(seed)
    common = F.normalize(torch.randn(D, device="cuda", generator=torch.Generator("cuda").manual_seed(0)), dim=0)

    def make(rows: int) -> Tensor:
        return torch.randn(rows, D, device="cuda", dtype=torch.bfloat16, generator=generator).div_(D**0.5)

    queries, passages = make(B), make(N)
    targets = torch.arange(B, device="cuda") * (N // B)
    passages[targets] = passages[targets] * math.sqrt(1 - signal**2) + signal * queries
    for tensor in (queries, passages):
        for piece in tensor.split(65536):  # the float32 copies of a million rows would not be small
            piece.copy_(F.normalize(math.sqrt(0.4) * piece.float() + math.sqrt(0.6) * common, dim=1))
    return queries.requires_grad_(), passages.requires_grad_(), targets


def exact(queries: Tensor, passages: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients in float64, by rows; a tiny loss keeps its digits."""
    q, p = queries.detach().double(), passages.detach().double()
    total, d_queries, d_passages = q.new_zeros(()), torch.empty_like(q), torch.zeros_like(p)
    for start in range(0, len(q), 1024):
        piece, own = q[start : start + 1024], targets[start : start + 1024]
        mine = torch.arange(len(own), device=q.device)
        scores = piece @ p.T / temperature
        scores -= scores[mine, own, None]
        scores[mine, own] = -math.inf
        top = scores.amax(1).clamp_min(0)
        others = (scores - top[:, None]).exp_()
        rest, positive = others.sum(1), (-top).exp()
        total += (top + torch.log1p(rest + torch.expm1(-top))).sum()
        others[mine, own] = -rest
        share = others / ((rest + positive) * (temperature * len(q)))[:, None]
        d_queries[start : start + 1024] = share @ p
        d_passages += share.T @ piece
    return total / len(q), d_queries, d_passages


def error(found: Tensor, truth: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return ((found.double() - truth).norm() / truth.norm()).item()
