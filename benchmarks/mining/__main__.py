"""What do mined negatives gain, and what do masks? Train, mine, train again, over several seeds.

    python -m benchmarks.mining --model MINILM --data medquad fairytaleqa --output runs/mining

Each of --data is a BEIR folder with the splits train and test. For every seed there are four runs of as many steps:

    plain     --model, trained with in-batch negatives
    again     plain's own model, trained on in the same way: what more steps alone are worth
    mined     plain's own model, trained on with hard negatives that it mined
    unmasked  as plain, with copies of the positives left among the negatives

They are measured on the test split over the whole corpus. A row is a folder, a run and a measure: the mean over the
seeds, the spread (the sample's standard deviation), and the difference to `again` (of `mined`) or `plain` (of
`unmasked`), seed by seed, with its own spread. A difference of no more than twice its standard error is called null.
Finished runs are not repeated.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from inbatch.data import load_retrieval
from inbatch.encoder.model import BiEncoderModel
from inbatch.encoder.packing import wish
from inbatch.retrieval.embed import EmbedOptions
from inbatch.retrieval.evaluate import RetrieveOptions, evaluate
from inbatch.retrieval.mine import MineOptions, mine, open_mining_set
from inbatch.train.config import Config, DataConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig
from inbatch.train.loop import train

BESIDE = {"mined": "again", "unmasked": "plain"}
MEASURES = ("nDCG@10", "R@100", "RR@10")


def config_of(args: argparse.Namespace, model: str, source: str, seed: int, output: Path, *, masked: bool) -> Config:
    return Config(
        model=ModelConfig(name_or_path=model),
        data=DataConfig(
            train=source, query_max_len=64, passage_max_len=args.passage_max_len, train_n_passages=1 + args.negatives
        ),
        loss=LossConfig(temperature=0.02, mask_duplicates=masked),
        optim=OptimConfig(lr=args.lr),
        train=TrainConfig(
            output_dir=str(output), seed=seed, global_batch_size=args.batch, epochs=args.epochs,
            max_steps=args.max_steps, progress=False, loggers=[], log_every=1000,
        ),
    )  # fmt: skip


def options(args: argparse.Namespace) -> RetrieveOptions:
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    return RetrieveOptions(
        query_max_len=64, passage_max_len=args.passage_max_len, embedding=EmbedOptions(precision=precision)
    )


def opened(folder: Path) -> BiEncoderModel:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return BiEncoderModel.from_pretrained(folder, dtype=torch.float32, packed=wish(None, device)).to(device).eval()


def one_seed(args: argparse.Namespace, folder: str, seed: int, root: Path) -> dict[str, dict[str, float]]:
    """Return the figures of the four runs of one seed."""
    test = load_retrieval(folder, "test")
    figures = {}

    def run(name: str, model: str, source: str, *, masked: bool = True) -> Path:
        place = root / name
        train(config_of(args, model, source, seed, place, masked=masked))
        figures[name] = evaluate(opened(place / "model"), test, options(args), measures=MEASURES)
        return place / "model"

    trained = run("plain", args.model, folder)
    run("unmasked", args.model, folder, masked=False)
    run("again", str(trained), folder)
    mined = root / "mined.jsonl"
    if not mined.exists():
        rules = MineOptions(num_negatives=args.negatives, range_max=50, relative_margin=0.05, seed=seed)
        mine(opened(trained), open_mining_set(folder), mined, rules, options(args))
    run("mined", str(trained), str(mined))
    return figures


def spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.4f} +- {statistics.stdev(values) if len(values) > 1 else 0:.4f}"


def lines(folder: str, by_seed: Sequence[dict[str, dict[str, float]]]) -> list[str]:
    """Return a line for each run and measure."""
    shown = []
    for name in by_seed[0]:
        for measure in MEASURES:
            values = [figures[name][measure] for figures in by_seed]
            line = f"{Path(folder).name:12} {name:9} {measure:8} {spread(values)}"
            if name in BESIDE:
                gains = [figures[name][measure] - figures[BESIDE[name]][measure] for figures in by_seed]
                error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("inf")
                verdict = "null" if abs(statistics.mean(gains)) <= 2 * error else "seen"
                line += f"   against {BESIDE[name]}: {spread(gains)} ({verdict})"
            shown.append(line)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True, help="runs and figures.jsonl; finished runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--negatives", type=int, default=4)
    parser.add_argument("--passage-max-len", type=int, default=256)
    args = parser.parse_args()
    everything = []
    for folder in args.data:
        by_seed = []
        for seed in args.seeds:
            start = time.perf_counter()
            by_seed.append(one_seed(args, folder, seed, args.output / Path(folder).name / str(seed)))
            row = {"data": folder, "seed": seed, "wall_s": round(time.perf_counter() - start, 1), **by_seed[-1]}
            print(json.dumps(row), flush=True)
            with (args.output / "figures.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        everything += lines(folder, by_seed)
    print("\n".join(everything))


if __name__ == "__main__":
    main()
