"""What does the loss over several vectors a text cost, forward and backward, beside sentence-transformers' scoring?

    python -m benchmarks.maxsim --queries 128 --passages 1024 --query-tokens 32 --passage-tokens 180

Ragged lengths: a half to all of the tokens given. First both losses and their gradients are compared with a float64
loop over chunks of the grid; then each row runs in a process of its own, so that its peak of memory is its own. Memory
is what the peak lies above the inputs and their gradients: of the allocator on a GPU, resident on a CPU. "grid" is the
size of all token pairs in float32. Seconds are of the wall, the median of --repeats after one.
"""

import argparse
import json
import multiprocessing
from pathlib import Path

import torch

from benchmarks.maxsim.measure import ROWS, exact, inputs, measure, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"queries": 128, "passages": 1024, "query_tokens": 32, "passage_tokens": 180}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--dimension", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON lines to append the results to")
    args = parser.parse_args()
    settings = {name: value for name, value in vars(args).items() if name not in ("output", "repeats")}
    small = argparse.Namespace(**{**settings, "queries": min(args.queries, 8), "passages": 16})
    small.queries = max(divisor for divisor in (1, 2, 4, 8) if divisor <= small.queries)
    given = inputs(small)
    wanted = run(exact, given)
    errors = {}
    for name, function in ROWS.items():
        found = run(function, given)
        errors[name] = max(
            float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, wanted, strict=True)
        )
        exact_enough = errors[name] < (1e-5 if args.dtype == "float32" else 1e-2)
        assert exact_enough or name != "inbatch", errors[name]
        if not exact_enough:  # a peer's row is timed all the same, beside its error
            print(f"{name} is off by {errors[name]:.1e}")
    grid_mib = args.queries * args.query_tokens * args.passages * args.passage_tokens * 4 / 2**20
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    lines = []
    for name in ROWS:
        with multiprocessing.get_context("spawn").Pool(1) as alone:
            figures = alone.apply(measure, (name, args))
        lines.append(
            {
                "row": name, **settings, "device": device, "torch": torch.__version__, "grid_mib": round(grid_mib),
                "largest_error": float(f"{errors[name]:.1e}"),
                **{key: round(value, 3) for key, value in figures.items()},
            }
        )  # fmt: skip
        print(json.dumps(lines[-1]))
    if args.output:
        with args.output.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    main()
