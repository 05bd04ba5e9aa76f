"""How exact, how fast and how lean is the loss, forward and backward, beside what people use today?

    python -m benchmarks.loss --out benchmarks/results             one GPU: errors, time, memory, chart
    torchrun --nproc-per-node 2 -m benchmarks.loss --out ...       several GPUs of one host: gather and ring
    python -m benchmarks.loss --quick --json                       the main shape alone, JSON on standard output
    python -m benchmarks.loss --show benchmarks/results            table and chart of saved results; needs no GPU

Peers are rows where their package is installed: liger-kernel, cut-cross-entropy, inf-cl, quack-kernels. All rows get
the same bfloat16 inputs, and are timed in turns. TF counts 6 * B * N * D operations, whatever a row really does; its
share is that rate over the mean rate of the plain bfloat16 products S, dQ and dP of the same shape in the same run.
Errors are relative to float64, and come first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.loss.measure import busy_ms, card_under, failure, in_turns, memory, plain_products, step
from benchmarks.loss.report import draw, facts, table
from benchmarks.loss.rows import Row, error, exact, pairs, rows
from benchmarks.loss.several import TEMPERATURE, several_gpus

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
    *((B, 2 * B, 1024) for B in (4096, 16384, 2048, 65536, 8192)),
    (131072, 131072, 1024),
]
LAUNCHES_DOMINATE = 2**25  # scores; there the table says for how long of a step the GPU works
SETTINGS = [  # temperature, signal: how much closer a query's positive is
    (0.05, 0.3, "T 0.05"),
    (0.02, 0.3, "T 0.02"),
    (0.01, 0.3, "T 0.01"),
    (0.02, 0.9, "T 0.02, tiny losses"),
    (0.002, -0.3, "T 0.002, positives lose by 100 nats"),
]


def errors(compared: list[Row], result: dict, save: Callable[[dict], None]) -> None:
    for temperature, signal, setting in SETTINGS:
        queries, passages, targets = pairs(4096, 16384, 1024, seed=1, signal=signal)
        truth, d_queries, d_passages = exact(queries, passages, targets, temperature)
        for row in compared:
            values: dict = {"setting": setting, "row": row.name, "exact_loss": truth.item()}
            arguments = (queries, passages, targets, temperature)
            try:
                value = step(partial(row.loss, *arguments), (queries, passages))
                values["loss_error"] = abs(value.double().item() - truth.item()) / truth.item()
                values |= {"dq": error(queries.grad, d_queries), "dp": error(passages.grad, d_passages)}
            except Exception as problem:
                values |= failure(problem)
            result["errors"].append(values)
            print(values, file=sys.stderr)
        save(result)


def one_gpu(options: argparse.Namespace, save: Callable[[dict], None]) -> dict:
    compared = rows()
    result: dict = {"facts": facts(1), "errors": [], "shapes": []}
    errors(compared, result, save)
    for B, N, D in [MAIN_SHAPE] if options.quick else SHAPES:
        torch._dynamo.reset()
        asked = [row for row in compared if row.largest >= B * N and (row.everywhere or (B, N, D) == MAIN_SHAPE)]
        result["shapes"].append(shape(asked, B, N, D))
        print(json.dumps(result["shapes"][-1]), file=sys.stderr)
        save(result)
    for found in result["shapes"]:  # last, see busy_ms
        if found["B"] * found["N"] <= LAUNCHES_DOMINATE:
            add_busy(compared, found)
            save(result)
    return result


def shape(asked: list[Row], B: int, N: int, D: int) -> dict:
    """Memory of every row, then the time of those that have the memory."""
    queries, passages, targets = pairs(B, N, D)
    found, steps = {}, {}
    for row in asked:
        loss = partial(row.loss, queries, passages, targets, TEMPERATURE)
        try:
            found[row.name] = memory(loss, (queries, passages))
            steps[row.name] = partial(step, loss, (queries, passages))
        except Exception as problem:
            found[row.name] = failure(problem)
    products, operations = plain_products(queries, passages)
    times = in_turns(products | steps)
    plain = {name: operations / times[name] / 1e9 for name in products}
    for name in steps:
        tflops = 6 * B * N * D / times[name] / 1e9
        found[name] |= {"ms": times[name], "tflops": tflops, "share": tflops / statistics.mean(plain.values())}
    card = card_under(steps["inbatch"]) if (B, N, D) == MAIN_SHAPE and "inbatch" in steps else {}
    named = [{"row": name, **values} for name, values in found.items()]
    return {"B": B, "N": N, "D": D, "plain_tflops": plain, "card": card, "rows": named}


def add_busy(compared: list[Row], found: dict) -> None:
    torch._dynamo.reset()
    queries, passages, targets = pairs(found["B"], found["N"], found["D"])
    losses = {row.name: row.loss for row in compared}
    for values in found["rows"]:
        if "ms" in values:
            loss = partial(losses[values["row"]], queries, passages, targets, TEMPERATURE)
            values["busy_ms"] = busy_ms(partial(step, loss, (queries, passages)))


def save_to(folder: Path | None, name: str, result: dict) -> None:
    """After every row, so that a run that is cut short leaves what it has."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def show(folder: Path) -> None:
    for path in sorted(folder.glob("loss*.json")):
        result = json.loads(path.read_text())
        print(table(result), end="\n\n")
        if result["facts"]["gpus"] == 1:
            draw(result, path.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for loss.json (loss_2_gpus.json) and loss.png")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table on standard output")
    parser.add_argument("--quick", action="store_true", help="one GPU: the main shape alone")
    parser.add_argument(
        "--show", type=Path, metavar="FOLDER", help="measure nothing: show what is saved in this folder"
    )
    options = parser.parse_args()
    if options.show:
        show(options.show)
        return
    world, first = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0") == "0"
    save = partial(save_to, options.out if first else None, "loss" if world == 1 else f"loss_{world}_gpus")
    result = several_gpus(save) if world > 1 else one_gpu(options, save)
    if first:
        save(result)
        print(json.dumps(result, indent=1) if options.json else table(result))
        if options.out and world == 1 and not options.quick:
            draw(result, options.out / "loss.png")


if __name__ == "__main__":
    main()
