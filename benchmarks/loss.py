"""How exact, how fast and how lean is the loss, forward and backward, beside what people use today?

    python benchmarks/loss.py --out benchmarks/results             one GPU: errors, time, memory, chart
    torchrun --nproc-per-node 2 benchmarks/loss.py --out ...       several GPUs of one host: gather and ring
    python benchmarks/loss.py --quick --json                       the main shape alone, JSON on standard output

Peers are rows where their package is installed: liger-kernel, cut-cross-entropy, inf-cl. All rows get the same bfloat16
inputs. TF counts 6 * B * N * D operations, whatever a row really does; its share is that rate over the mean rate of the
plain bfloat16 products S, dQ and dP of the same shape in the same run. Errors are relative to float64, and come first.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from _loss_report import draw, facts, table
from _loss_rows import Row, eager, error, exact, float32_scores, pairs, rows

from inbatch import InfoNCELoss, collectives

MAIN_SHAPE = (32768, 65536, 1024)
SHAPES = [  # B, N, D; those with N = 2 B and D = 1024 make the chart
    MAIN_SHAPE,
    (32768, 65536, 256),
    (32768, 65536, 768),
    (32768, 65536, 4096),
    (256, 2048, 1024),
    (1024, 8192, 1024),
    (4096, 32768, 1024),
    (65536, 1048576, 1024),
    (131072, 131072, 1024),
    *((B, 2 * B, 1024) for B in (2048, 4096, 8192, 16384, 65536)),
]
SETTINGS = [  # temperature, signal: how much closer a query's positive is
    (0.05, 0.3, "T 0.05"),
    (0.02, 0.3, "T 0.02"),
    (0.01, 0.3, "T 0.01"),
    (0.02, 0.9, "T 0.02, losses near 1e-5"),
    (0.002, -0.3, "T 0.002, positives lose by 100 nats"),
]
TEMPERATURE = 0.02
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


def errors(compared: list[Row]) -> list[dict]:
    results = []
    for temperature, signal, setting in SETTINGS:
        queries, passages, targets = pairs(4096, 16384, 1024, seed=1, signal=signal)
        truth, d_queries, d_passages = exact(queries, passages, targets, temperature)
        for row in compared:
            result: dict = {"setting": setting, "row": row.name, "exact_loss": truth.item()}
            arguments = (queries, passages, targets, temperature)
            try:
                value = step(lambda row=row, arguments=arguments: row.loss(*arguments), (queries, passages))
                result |= {"loss_error": abs(value.double().item() - truth.item()) / truth.item()}
                result |= {"dq": error(queries.grad, d_queries), "dp": error(passages.grad, d_passages)}
            except Exception as problem:
                result |= failure(problem)
            results.append(result)
            print(result, file=sys.stderr)
    return results


def median_ms(run: Callable[[], object], *, warm_s: float = 0.15, measure_s: float = 0.35, most: int = 200) -> float:
    """Median of single runs in a row, the GPU warm: a short burst after a pause clocks higher than training does."""
    run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    once_s = time.perf_counter() - begin
    for _ in range(min(int(warm_s / once_s), most)):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(max(min(int(measure_s / once_s), most), 3) + 1)]
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
        products = {
            "S": lambda: torch.mm(queries, passages.T, out=scores),
            "dQ": lambda: torch.mm(scores, passages, out=d_queries),
            "dP": lambda: torch.mm(scores.T, queries, out=d_passages),
        }
        times = {name: median_ms(product) for name, product in list(products.items())[::-1]}  # S last: it writes scores
    return {name: 2 * scores.numel() * queries.shape[1] / times[name] / 1e9 for name in products}


def measure(loss: Callable[[], Tensor], leaves: tuple[Tensor, Tensor], timer: Callable[..., float]) -> dict:
    """Median time, and the peak of a step after the first above what was there before: gradients included."""
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


def one_gpu(options: argparse.Namespace) -> dict:
    compared = rows()
    result: dict = {"facts": facts(1), "errors": errors(compared), "shapes": []}
    for B, N, D in [MAIN_SHAPE] if options.quick else SHAPES:
        torch._dynamo.reset()
        arguments = pairs(B, N, D)
        plain = plain_products(*arguments[:2])
        found = []
        for row in compared:
            if row.largest < B * N or not (row.everywhere or (B, N, D) == MAIN_SHAPE):
                continue
            try:
                values = measure(
                    lambda row=row, arguments=arguments: row.loss(*arguments, TEMPERATURE), arguments[:2], median_ms
                )
                values["tflops"] = 6 * B * N * D / values["ms"] / 1e9
                values["share"] = values["tflops"] / statistics.mean(plain.values())
            except Exception as problem:
                values = failure(problem)
            found.append({"row": row.name, **values})
            print(B, N, D, found[-1], file=sys.stderr)
        result["shapes"].append({"B": B, "N": N, "D": D, "plain_tflops": plain, "rows": found})
        save(result, options.out, "loss")  # a run that is cut short leaves what it has
    return result


# ---- several GPUs


def several_gpus() -> dict:
    """B is what each rank has; N are the passages of all ranks, so every rank computes B x N scores."""
    collectives.start()
    rank, world = collectives.rank(), collectives.world_size()
    compiled = torch.compile(float32_scores, dynamic=False)

    def formula(function: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        def loss(queries: Tensor, passages: Tensor) -> Tensor:
            everyone = collectives.all_gather(passages)
            own = rank * len(passages) + torch.arange(len(queries), device="cuda") * (len(passages) // len(queries))
            return function(queries, everyone, own, TEMPERATURE)

        return loss

    compared = {
        "inbatch, gather": InfoNCELoss(TEMPERATURE),
        "inbatch, ring": InfoNCELoss(TEMPERATURE, negatives="ring"),
        "gather + torch.compile, float32 scores": formula(compiled),
        "gather + eager": formula(eager),
    }
    result: dict = {"facts": facts(world), "errors": distributed_errors(compared, rank, world), "shapes": []}
    for B, M, D in [(8192, 32768, 1024), (16384, 65536, 1024)]:
        torch._dynamo.reset()
        N, found = M * world, []
        for name, loss in [
            *compared.items(),
            ("inbatch, all N local: no communication", InfoNCELoss(TEMPERATURE, negatives="local")),
        ]:
            leaves = pairs(B, N if "local" in name else M, D, seed=rank)[:2]
            try:
                values = measure(lambda loss=loss, leaves=leaves: loss(*leaves), leaves, together_ms)
                worst = torch.tensor(list(values.values()), device="cuda", dtype=torch.float64)
                values = dict(zip(values, collectives.all_reduce(worst, "max").tolist(), strict=True))
                values["tflops"] = 6 * B * N * D / values["ms"] / 1e9
            except torch.OutOfMemoryError as problem:  # on every rank: they hold the same
                values = failure(problem)
            found.append({"row": name, **values})
            if rank == 0:
                print(B, N, D, found[-1], file=sys.stderr)
        result["shapes"].append({"B": B, "N": N, "D": D, "rows": found})
    collectives.stop()
    return result


def together_ms(run: Callable[[], object]) -> float:
    """Median of as many runs on every rank."""
    for _ in range(3):
        run()
    collectives.barrier()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(9)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def distributed_errors(compared: dict[str, Callable[[Tensor, Tensor], Tensor]], rank: int, world: int) -> list[dict]:
    """Each rank's loss and gradients against one float64 process that holds every rank's rows; the worst rank."""
    B, M = 512, 2048
    everyone = [pairs(B, M, 1024, seed=seed) for seed in range(world)]
    targets = torch.cat([own + seed * M for seed, (_, _, own) in enumerate(everyone)])
    all_queries, all_passages = (torch.cat([each[side] for each in everyone]) for side in (0, 1))
    truth, d_queries, d_passages = exact(all_queries, all_passages, targets, TEMPERATURE)
    queries, passages = everyone[rank][:2]
    results = []
    for name, function in compared.items():
        value = step(lambda function=function: function(queries, passages), (queries, passages))
        mean = collectives.all_reduce(value.detach().clone()) / world
        loss_error = abs(mean.item() - truth.item()) / truth.item()
        dq = error(queries.grad / world, d_queries.split(B)[rank])
        dp = error(passages.grad / world, d_passages.split(M)[rank])
        worst = collectives.all_reduce(torch.tensor([loss_error, dq, dp], device="cuda"), "max").tolist()
        results.append(
            {"setting": f"{world} ranks", "row": name, **dict(zip(("loss_error", "dq", "dp"), worst, strict=True))}
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for loss.json (loss_2_gpus.json) and loss.png")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table on standard output")
    parser.add_argument("--quick", action="store_true", help="one GPU: the main shape alone")
    options = parser.parse_args()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    result = several_gpus() if world > 1 else one_gpu(options)
    if os.environ.get("RANK", "0") != "0":
        return
    print(json.dumps(result, indent=1) if options.json else table(result))
    save(result, options.out, "loss" if world == 1 else f"loss_{world}_gpus")
    if options.out and world == 1 and not options.quick:
        draw(result, options.out / "loss.png")


def save(result: dict, folder: Path | None, name: str) -> None:
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
