"""What does the loss over several vectors a text cost, forward and backward, beside others' scoring?

    python -m benchmarks.maxsim [--shape QUERIES PASSAGES QUERY_TOKENS PASSAGE_TOKENS]... [--sweep] [--output FILE]

Ragged lengths: a half to all of the tokens given. First every row's loss and gradients are compared with a float64 loop
over the queries, and a second time with themselves, bit for bit. Then each row is measured; on a CPU in a process of
its own, so that its peak of memory is its own. Memory is what the peak lies above the inputs and their gradients: of
the allocator on a GPU, resident on a CPU. "grid" is the size of all token pairs in float32. Times are of the wall,
medians of --repeats; host_ms is until all is launched. A row that fails is printed with its error, and the next begins.
--sweep: then our kernels one by one on a GPU, with other tiles.
"""

import argparse
import itertools
import json
import multiprocessing
from pathlib import Path

import torch

from benchmarks.maxsim.measure import ROWS, check, grid_mib, measure, sweep

SHAPES = [[128, 1024, 32, 180], [32, 64, 512, 1024]] if torch.cuda.is_available() else [[64, 512, 32, 180]]


def write(line: dict, output: Path | None) -> None:
    print(json.dumps(line), flush=True)
    if output:
        with output.open("a") as file:
            file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=4, action="append", help="default: those of the documentation")
    parser.add_argument("--dimension", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--repeats", type=int, default=10 if torch.cuda.is_available() else 3)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON lines to append the results to")
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    about = {"dimension": args.dimension, "dtype": args.dtype, "device": device, "torch": torch.__version__}
    shapes, failed = args.shape or SHAPES, []
    for shape, name in itertools.product(shapes, args.rows):
        line = {"row": name, "shape": shape, "grid_mib": round(grid_mib(shape)), **about}
        try:
            line |= check(name, shape, args)
            if torch.cuda.is_available():
                line |= measure(name, shape, args)
            else:
                with multiprocessing.get_context("spawn").Pool(1) as alone:
                    line |= alone.apply(measure, (name, shape, args))
        except Exception as error:  # a peer's, or one that a new machine brings: the other rows count all the same
            line["error"] = f"{type(error).__name__}: {error}"[:500]
        write(line, args.output)
        exact = line.get("largest_error", 1.0) < (1e-5 if args.dtype == "float32" else 1e-2)
        if name.startswith("inbatch") and not (exact and line.get("repeats")):
            failed.append(name)
    if args.sweep:
        for shape in shapes:
            for line in sweep(shape, args):
                write({"shape": shape, **line}, args.output)
    if failed:
        raise SystemExit(f"not exact, not repeated or failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
