"""benchmarks.loss on several GPUs of one host: gather, ring, and what others do.

Shapes: B queries and M passages on each rank, N = M * ranks passages in all; so every rank computes B x N scores.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.loss.measure import failure, in_turns, memory, step
from benchmarks.loss.report import facts
from benchmarks.loss.rows import eager, error, exact, float32_scores, pairs
from inbatch import InfoNCELoss, collectives

SHAPES = [(8192, 32768, 1024), (16384, 65536, 1024)]  # B, M, D
TEMPERATURE = 0.02
ALONE = "inbatch, all N local: no communication"

Loss = Callable[[Tensor, Tensor], Tensor]


def gathered(function: Callable[..., Tensor]) -> Loss:
    """A formula over everyone's passages, gathered with gradient."""

    def loss(queries: Tensor, passages: Tensor) -> Tensor:
        everyone = collectives.all_gather(passages)
        first = collectives.rank() * len(passages)
        own = first + torch.arange(len(queries), device=queries.device) * (len(passages) // len(queries))
        return function(queries, everyone, own, TEMPERATURE)

    return loss


def several_gpus(save: Callable[[dict], None]) -> dict:
    collectives.start()
    rank, world = collectives.rank(), collectives.world_size()
    compared: dict[str, Loss] = {
        "inbatch, gather": InfoNCELoss(TEMPERATURE),
        "inbatch, ring": InfoNCELoss(TEMPERATURE, negatives="ring"),
        ALONE: InfoNCELoss(TEMPERATURE, negatives="local"),
        "gather + eager": gathered(eager),
        "gather + torch.compile, float32 scores": gathered(torch.compile(float32_scores, dynamic=False)),
    }
    result: dict = {"facts": facts(world), "errors": [], "shapes": []}
    for name in ("inbatch, gather", "inbatch, ring", "gather + eager"):
        result["errors"].append({"setting": f"{world} ranks", "row": name, **worst_error(compared[name], rank, world)})
    for B, M, D in SHAPES:
        N, found, steps = M * world, {}, {}
        for name, loss in compared.items():
            leaves = pairs(B, N if name == ALONE else M, D, seed=rank)[:2]
            call = partial(loss, *leaves)
            try:
                found[name] = worst(memory(call, leaves))
                steps[name] = partial(step, call, leaves)
            except torch.OutOfMemoryError as problem:  # on every rank, since all hold the same
                found[name] = failure(problem)
        times = worst(in_turns(steps, agree=lambda seconds: worst({"": seconds})[""]))
        for name, ms in times.items():
            found[name] |= {"ms": ms, "tflops": 6 * B * N * D / ms / 1e9}
        rows = [{"row": name, **values} for name, values in found.items()]
        result["shapes"].append({"B": B, "N": N, "D": D, "rows": rows})
        if rank == 0:
            print(result["shapes"][-1], file=sys.stderr)
            save(result)
    collectives.stop()
    return result


def worst(values: dict[str, float]) -> dict[str, float]:
    """Of all ranks."""
    most = collectives.all_reduce(torch.tensor(list(values.values()), device="cuda", dtype=torch.float64), "max")
    return dict(zip(values, most.tolist(), strict=True))


def worst_error(loss: Loss, rank: int, world: int) -> dict[str, float]:
    """The ranks' mean loss and gradients against one float64 process that holds everyone's rows; the worst rank's."""
    B, M = 512, 2048
    everyone = [pairs(B, M, 1024, seed=seed) for seed in range(world)]
    targets = torch.cat([own + seed * M for seed, (_, _, own) in enumerate(everyone)])
    all_queries, all_passages = (torch.cat([each[side] for each in everyone]) for side in (0, 1))
    truth, d_queries, d_passages = exact(all_queries, all_passages, targets, TEMPERATURE)
    queries, passages = everyone[rank][:2]
    value = step(lambda: loss(queries, passages), (queries, passages))
    mean = collectives.all_reduce(value.detach().clone()) / world
    errors = [
        abs(mean.item() - truth.item()) / truth.item(),
        error(queries.grad / world, d_queries.split(B)[rank]),
        error(passages.grad / world, d_passages.split(M)[rank]),
    ]
    return worst(dict(zip(("loss_error", "dq", "dp"), errors, strict=True)))
