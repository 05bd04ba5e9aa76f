"""How fast and how lean is a whole training step? Texts to updated weights, beside sentence-transformers and GradCache.

    python -m benchmarks.step --model FOLDER --batch 4096                        the default rows
    python -m benchmarks.step --model qwen3-0.6b --tokenizer FOLDER --batch 1024 --row "inbatch compile"
    torchrun --nproc-per-node 4 -m benchmarks.step ...                           inbatch rows alone, over all GPUs

A row is a library and its options: "st-cached mini=64", "st-cached tokens=32768", "st-plain", "st-inbatch" (our cached
loss with their model, as their trainer calls it), "gradcache mini=64"
(`pip install --no-deps GradCache==0.0.1`; Tevatron's trainer calls the same class), "inbatch", and for inbatch any of
packed, padded (neither: as its trainer does), compile (as it does in a long run), liger, ckpt, weights=bf16
(bfloat16 copies of the float32 weights compute), fsdp2 (weights are sharded), tokens=N, keep=MIB. Every row trains the
same model on the same pairs, lengths and fused AdamW, in bfloat16 autocast unless weights=bf16. The last line compares
the best row of inbatch with the best of the others.

Tokenising is measured beside the steps: worker processes make all batches of a row before its first step (those of a
row that says `inline` within the step, as the trainer of sentence-transformers does by default). pairs/s is the slower
of steps and workers. "share" is 6 operations
a parameter and real token, plus attention's, over a plain product's rate in the same run. "padding" is what is encoded.
"gradient off by" is |g - g*| / |g*| over the backbone, where g* is a plain float32 step over --check-pairs pairs;
dropout is off for it.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.step.figures import bf16_peak, count_flops, gradient_error, plain_gradient, profile, sync
from benchmarks.step.rows import ON_GPU, ROOT, SIZES, Row, build, collectives, model_folder, read_pairs, start_worker

SWEEP = [f"st-cached tokens={tokens}" for tokens in (16384, 32768, 65536, 131072, 262144)]
PEER_ROWS = ["st-cached inline mini=32", *SWEEP, "gradcache mini=128"]
DEFAULT_ROWS = [*PEER_ROWS, "inbatch", "inbatch weights=bf16", "inbatch padded", "inbatch compile"]


# ---- measuring


class Tokenized(Dataset):
    """This rank's share of one global batch after the other, without end, and the seconds it took to make."""

    def __init__(self, pairs: list, args, tokenize: Callable[[list], list], per_step: int):
        self._pairs, self._batch, self._tokenize, self._per_step = pairs, args.batch, tokenize, per_step
        self._rank, self._world_size = collectives.rank(), collectives.world_size()

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, step: int) -> tuple[list, float]:
        start = time.perf_counter()
        first = self._rank * self._batch // self._world_size
        last = (self._rank + 1) * self._batch // self._world_size
        rows = [self._pairs[(step * self._batch + row) % len(self._pairs)] for row in range(first, last)][
            : self._per_step
        ]
        return self._tokenize(rows), time.perf_counter() - start


def make_ahead(tokenized: Tokenized, number: int, workers: int) -> list[tuple[list, float]]:
    """Return so many batches, and one for each worker, made by processes that have ended; none without workers.

    Processes, since a tokenising thread would hold the lock that launching kernels needs; forked, to share the texts.
    All work at once, so that a batch takes each as long as it does where they share the cores.
    """
    if not workers:
        return []
    loader = DataLoader(
        tokenized, sampler=range(max(number, workers)), batch_size=None, num_workers=workers, prefetch_factor=2,
        multiprocessing_context="fork", timeout=120, worker_init_fn=start_worker,
    )  # fmt: skip
    return list(loader)


def measure(row: Row, folder: Path, pairs: list, args) -> dict:
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
    trial = build(row, folder, args)
    optimizer = torch.optim.AdamW(trial.module.parameters(), lr=1e-5, fused=True)
    tokenized = Tokenized(pairs, args, trial.tokenize, args.batch)
    small_first = bool(args.warm_up_pairs) or not trial.ahead
    made = make_ahead(tokenized, args.warm_up + args.steps, args.workers if trial.ahead else 0)

    def update(batch: list) -> None:
        optimizer.zero_grad(set_to_none=True)
        trial.forward_backward(batch)
        torch.nn.utils.clip_grad_norm_(trial.module.parameters(), 1.0)
        optimizer.step()

    walls_s, tokenize_s = [], []
    for index in range(args.warm_up + args.steps):
        if index == args.warm_up and ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        if index < args.warm_up and small_first:
            # Where nothing is compiled, a small batch warms up as well, and the cached steps are slow.
            few = Tokenized(pairs, args, trial.tokenize, args.warm_up_pairs or 64)[index]
        else:
            few = None
        sync()
        start = time.perf_counter()
        batch, took_s = few or (made[index] if made else tokenized[index])
        tokenize_s.append(took_s)
        update(batch)
        sync()
        walls_s.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if ON_GPU else 0
    step_s = statistics.median(walls_s[args.warm_up :])
    in_worker_s = [took_s for _, took_s in made]
    made_s = statistics.median(in_worker_s) / args.workers if made else statistics.median(tokenize_s[args.warm_up :])
    if args.profile:
        few, _ = Tokenized(pairs, args, trial.tokenize, args.profile)[0]
        profile(lambda: update(few))
    lengths = torch.cat([part["attention_mask"].sum(1) for part in batch]).double().cpu()
    return {
        "pairs_per_s": args.batch / max(step_s, made_s),
        "step_ms": step_s * 1e3,
        "tokenize_ms": made_s * 1e3,
        "micro_batch_tokens": trial.grad_cache.micro_batch_tokens if trial.grad_cache else row.tokens,
        "share_of_peak": count_flops(trial.backbone, lengths) / step_s / args.peak,
        "peak_gib": peak / 2**30,
        "padding": 1 - float(lengths.sum()) / trial.encoded_tokens(batch),
        "mean_tokens": float(lengths.mean()),
        "warm_up_s": sum(walls_s[: args.warm_up]),
    }


# ---- the table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"a model folder, or one of {', '.join(SIZES)} (random weights)")
    parser.add_argument("--tokenizer", help="folder of the tokenizer for a model of random weights")
    parser.add_argument("--data", type=Path, default=ROOT / "examples" / "pystdlib", help="a BEIR folder")
    parser.add_argument("--batch", type=int, default=1024, help="pairs of the global batch")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--row", action="append", help="repeat for several; default: " + ", ".join(DEFAULT_ROWS))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--warm-up-pairs", type=int, default=0, help="pairs of a step before; default: the whole batch")
    parser.add_argument("--workers", type=int, default=8, help="processes that tokenise for a row")
    parser.add_argument("--check-pairs", type=int, default=0, help="pairs for the gradient's error; 0 leaves it out")
    parser.add_argument("--profile", type=int, default=0, help="print the kernels of a step of so many pairs")
    parser.add_argument("--json", type=Path, help="append each row as a JSON line to this file")
    parser.add_argument("--show", type=Path, help="print such a file as a Markdown table and end")
    args = parser.parse_args()
    if not args.model and not args.show:
        parser.error("--model is missing")
    return args


def environment() -> dict:
    packages = {package.name for package in importlib.metadata.distributions()}
    names = ("torch", "transformers", "sentence-transformers", "GradCache")
    return {
        "gpu": torch.cuda.get_device_name() if ON_GPU else "none",
        **{name: importlib.metadata.version(name) for name in names if name.lower() in map(str.lower, packages)},
    }


def main() -> None:
    args = parse_arguments()
    if args.show:
        show(args.show)
        return
    launched = "RANK" in os.environ
    if launched:
        collectives.start()
    torch.set_float32_matmul_precision("highest")
    if ON_GPU:
        torch.set_num_threads(1)  # as torchrun has it: torch's CPU threads would compete with those that launch kernels
    args.peak = bf16_peak()
    folder, pairs = model_folder(args), read_pairs(args.data)
    if collectives.rank() == 0:
        print(environment())
        print(f"batch {args.batch} of {len(pairs)} pairs, plain bfloat16 product {args.peak / 1e12:.0f} TFLOP/s")
        print(f"{'':52} pairs/s  step ms  tokenising ms  share  peak GiB  padding  gradient off by", flush=True)
    with collectives.group_of_one(collectives.device()):
        expected = plain_gradient(folder, pairs[: args.check_pairs], args) if args.check_pairs else None
        rates: dict[str, float] = {}
        for text in args.row or DEFAULT_ROWS:
            if not launched or Row.parse(text).library == "inbatch":
                rates[text] = report(text, folder, pairs, args, expected)
        if collectives.rank() == 0:
            compare(rates)
    if launched:
        collectives.stop()


def compare(rates: dict[str, float]) -> None:
    """Print how many times faster the best row of inbatch is than the best of the others."""
    best: dict[bool, tuple[float, str]] = {}
    for text, rate in rates.items():
        ours = Row.parse(text).library in ("inbatch", "st-inbatch")
        best[ours] = max(best.get(ours, (0.0, "")), (rate, text))
    if len(best) == 2 and best[False][0]:
        times = best[True][0] / best[False][0]
        print(f"{best[True][1]}: {times:.2f} times the best of the others, {best[False][1]}")


def report(text: str, folder: Path, pairs: list, args: argparse.Namespace, expected: Tensor | None = None) -> float:
    """Measure a row, print it, append it to the JSON file; return its pairs a second, 0 for a row that failed."""
    row = Row.parse(text)
    try:
        figures = measure(row, folder, pairs, args)
        if expected is not None:
            figures["gradient_error"] = gradient_error(row, folder, pairs[: args.check_pairs], args, expected)
    except torch.OutOfMemoryError:
        figures = {"failed": "out of memory"}
    except ModuleNotFoundError as error:
        figures = {"failed": str(error)}
    except Exception as error:  # one peer that does not run here must not end the table
        figures = {"failed": f"{type(error).__name__}: {error}"[:200]}
        traceback.print_exc()
    if collectives.rank() == 0:
        print(format_row(text, figures), flush=True)
        if args.json:
            with args.json.open("a") as file:
                about = {"model": args.model, "batch": args.batch, "world_size": collectives.world_size()}
                file.write(json.dumps({"row": text, **about, **asdict(row), **figures, **environment()}) + "\n")
    return figures.get("pairs_per_s", 0.0)


def format_row(text: str, figures: dict) -> str:
    if "failed" in figures:
        return f"{text:52} {figures['failed']}"
    error = figures.get("gradient_error")
    return (
        f"{text:52} {figures['pairs_per_s']:7.0f}  {figures['step_ms']:7.0f}  {figures['tokenize_ms']:13.0f}  "
        f"{figures['share_of_peak']:5.1%}  {figures['peak_gib']:8.1f}  {figures['padding']:7.1%}  "
        + (f"{error:.2e}" if error is not None else "")
        + f"  (warm-up {figures['warm_up_s']:.0f} s)"
    )


def show(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for gpu, torch_version in sorted({(row["gpu"], row["torch"]) for row in rows}):
        print(f"{gpu}, torch {torch_version}\n")
    print("| model | GPUs | batch | row | pairs/s | step | peak | share | padding | gradient off by |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        about = f"| {Path(row['model']).name} | {row['world_size']} | {row['batch']} | {row['row']} |"
        if "failed" in row:
            print(f"{about} {row['failed']} | | | | | |")
            continue
        error = f"{row['gradient_error']:.1e}" if "gradient_error" in row else ""
        print(
            f"{about} {row['pairs_per_s']:.0f} | {row['step_ms']:.0f} ms | {row['peak_gib']:.1f} GiB | "
            f"{row['share_of_peak']:.1%} | {row['padding']:.1%} | {error} |"
        )


if __name__ == "__main__":
    main()
