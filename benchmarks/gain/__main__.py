"""What does each thing buy? Short trainings that differ in one setting, over several data sets and seeds.

    python -m benchmarks.gain --model MINILM --data medquad fairytaleqa pystdlib --gpus 4 --output runs/gain
    python -m benchmarks.gain.report runs/gain/figures.jsonl --output docs          the page docs/gain.md

    negatives    passages of all processes as negatives, or of the process alone       (on all GPUs together)
    gradient     exact gradients of other processes' passages, or none (detached)      (on all GPUs together)
    clock        inbatch and sentence-transformers' cached loss, for equal seconds of training steps
    masks        copies of positives left out of the negatives, or kept
    temperature  of the loss, at --batch and --lr
    precision    autocast, or bfloat16 copies of the weights
    batch        batch sizes at matched steps, each at the rate that is best on the dev split

Each cell trains --model for --steps steps and is measured on the splits dev and test over the whole corpus. A cell that
figures.jsonl has is not repeated, and none is begun after --budget-s; seeds come one after the other, so that a run
that was cut off is still whole for the first.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gain.cells import ALONE, TOGETHER, Cell, cells


def finished(output: Path) -> set[str]:
    """Return the keys of the cells that have figures."""
    file = output / "figures.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {row["key"] for row in rows if "failed" not in row}


def run_together(args: argparse.Namespace) -> None:
    """Train the cells of several processes; every rank calls it."""
    from benchmarks.gain.train import trained
    from inbatch import collectives

    collectives.start(timeout_s=120)
    done = collectives.broadcast_object(finished(args.output))
    for cell in cells(args, tuple(q for q in TOGETHER if q in args.questions)):
        if cell.key in done:
            continue
        if collectives.broadcast_object(time.time()) > args.until:
            break
        row = trained(cell, args)
        if collectives.rank() == 0:
            keep(args.output, cell, row)
    collectives.stop()


def run_alone(args: argparse.Namespace) -> None:
    """Train the cells of one process that no other process has claimed."""
    from benchmarks.gain.train import trained
    from inbatch import collectives

    collectives.start()
    done = finished(args.output)
    for number, cell in enumerate(cells(args, tuple(q for q in ALONE if q in args.questions))):
        if time.time() > args.until:
            break
        try:
            (args.output / "claims" / str(number)).touch(exist_ok=False)
        except FileExistsError:
            continue
        if cell.key not in done:
            keep(args.output, cell, trained(cell, args))


def keep(output: Path, cell: Cell, row: dict) -> None:
    line = json.dumps({"key": cell.key, **json.loads(cell.key), **row})
    with (output / "figures.jsonl").open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def start_all(args: argparse.Namespace) -> int:
    """Start the processes: first those that train together, then one for each GPU."""
    begun = time.time()
    args.output.mkdir(parents=True, exist_ok=True)
    again = [sys.executable, "-m", "benchmarks.gain", *sys.argv[1:]]
    codes = []
    if set(TOGETHER) & set(args.questions):
        share = 0.45 if set(ALONE) & set(args.questions) else 1
        ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.gpus)]
        command = [sys.executable, *ranks, *again[1:], "--until", str(begun + share * args.budget_s), "--phase"]
        try:
            codes.append(subprocess.run([*command, "together"], timeout=share * args.budget_s + 60).returncode)
        except subprocess.TimeoutExpired:
            codes.append(1)
    if set(ALONE) & set(args.questions):
        shutil.rmtree(args.output / "claims", ignore_errors=True)
        (args.output / "claims").mkdir()
        command = [*again, "--until", str(begun + args.budget_s), "--phase", "alone"]
        started = [
            subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": str(number % args.gpus)})
            for number in range(args.gpus * args.per_gpu)
        ]
        codes += [process.wait() for process in started]
    return max(codes, default=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", nargs="+", required=True, help="BEIR folders with the splits train, dev and test")
    parser.add_argument("--output", type=Path, required=True, help="figures.jsonl; cells that it has are not repeated")
    parser.add_argument("--gpus", type=int, default=4, help="processes; on a CPU, too")
    parser.add_argument("--per-gpu", type=int, default=1, help="processes that share a GPU; 1 for the question clock")
    parser.add_argument("--questions", nargs="+", choices=TOGETHER + ALONE, default=TOGETHER + ALONE)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1.5e-4)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-5, 1.5e-4, 5e-4])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.01, 0.02, 0.05, 0.1])
    parser.add_argument("--clock-batch", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=15, help="of training steps, of question clock")
    parser.add_argument("--mini-batch-num-tokens", type=int, default=262144, help="of sentence-transformers' loss")
    parser.add_argument("--passage-max-len", type=int, default=128)
    parser.add_argument("--budget-s", type=float, default=540, help="no cell is begun after so many seconds")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--phase", choices=("together", "alone"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase is None:
        return start_all(args)
    {"together": run_together, "alone": run_alone}[args.phase](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
