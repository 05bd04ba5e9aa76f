"""Write the page of docs about what each thing buys, with a chart for each question, from figures of benchmarks.gain.

python -m benchmarks.gain.report benchmarks/results/gain.jsonl --output docs
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MEASURE = "nDCG@10"
Row = dict[str, Any]
# question -> what is compared: name -> whether a row is of it; the first is what the others are compared with
COMPARED: dict[str, dict[str, Callable[[Row], bool]]] = {
    "negatives": {
        "local": lambda row: row["processes"] > 1 and row["negatives"] == "local",
        "global": lambda row: row["processes"] > 1 and row["negatives"] == "gather" and not row["detach_remote"],
    },
    "gradient": {
        "detached": lambda row: row["processes"] > 1 and row["detach_remote"],
        "exact": lambda row: row["processes"] > 1 and row["negatives"] == "gather" and not row["detach_remote"],
    },
    "masks": {
        "none": lambda row: row["masks"] is False,
        "own positive": lambda row: row["processes"] == 1 and row["masks"] == "positive",
        "all positives": lambda row: row["usual"],
    },
    "precision": {
        "autocast": lambda row: row["usual"],
        "bfloat16 copies": lambda row: row["precision"] == "bf16",
    },
    "clock": {
        "sentence-transformers": lambda row: row["library"] == "sentence-transformers",
        "inbatch": lambda row: row["seconds"] is not None and row["library"] == "inbatch",
    },
}
TITLES = {
    "negatives": "Negatives of one process, or of all",
    "gradient": "Passages of other processes: detached, or with exact gradients",
    "masks": "Copies of positives among the negatives",
    "precision": "Casts, or bfloat16 copies of the weights",
    "clock": "Equal seconds of training",
    "temperature": "Temperature",
    "batch": "Batch size at matched steps, at its best rate",
}


def load(path: Path) -> list[Row]:
    """Return the rows that have figures; `usual` marks those at the batch and rate of the unmasked."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if "failed" not in row]
    unmasked = {(row["batch"], row["lr"]) for row in rows if row["masks"] is False}
    for row in rows:
        alone = plain(row)
        row["usual"] = alone and (row["batch"], row["lr"]) in unmasked
    return rows


def plain(row: Row) -> bool:
    """Return True for a training of one process that only batch size and rate, and no other question, set apart."""
    usual = row["masks"] is True and row["temperature"] == 0.02 and row["precision"] == "autocast"
    return row["processes"] == 1 and row["seconds"] is None and usual


def by_seed(rows: Sequence[Row], data: str, wanted: Callable[[Row], bool]) -> dict[int, float]:
    return {row["seed"]: row["test"][MEASURE] for row in rows if row["data"] == data and wanted(row)}


def tuned(rows: Sequence[Row]) -> dict[str, dict[int, tuple[float, dict[int, float]]]]:
    """Return by data set and batch size the rate with the best mean on dev, and its figures on test by seed."""
    grouped: dict[tuple[str, int], dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if plain(row):
            grouped[row["data"], row["batch"]][row["lr"]].append(row)
    found: dict[str, dict[int, tuple[float, dict[int, float]]]] = defaultdict(dict)
    for (data, batch), rates in sorted(grouped.items()):
        rate = max(rates, key=lambda lr: statistics.mean(row["dev"][MEASURE] for row in rates[lr]))
        found[data][batch] = rate, {row["seed"]: row["test"][MEASURE] for row in rates[rate]}
    return found


def spread(values: Sequence[float], sign: str = "") -> str:
    return f"{statistics.mean(values):{sign}.4f} ± {statistics.stdev(values) if len(values) > 1 else 0:.4f}"


def difference(base: dict[int, float], other: dict[int, float]) -> str:
    """Return the mean difference over the seeds that both have, null where it is within twice its standard error."""
    gains = [other[seed] - base[seed] for seed in sorted(base.keys() & other.keys())]
    if len(gains) < 2:
        return f"{gains[0]:+.4f} (one seed)"
    error = statistics.stdev(gains) / len(gains) ** 0.5
    return spread(gains, "+") + (" (null)" if abs(statistics.mean(gains)) <= 2 * error else "")


def compared(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, dict[int, float]]]]:
    """Return question -> data set -> setting -> test figure by seed, for what has been measured."""
    names = sorted({row["data"] for row in rows})
    found = {
        question: {data: {name: by_seed(rows, data, wanted) for name, wanted in settings.items()} for data in names}
        for question, settings in COMPARED.items()
    }
    temperatures = sorted({row["temperature"] for row in rows})
    found["temperature"] = {
        data: {
            f"{t:g}": by_seed(rows, data, lambda row, t=t: row["temperature"] == t and (t != 0.02 or row["usual"]))
            for t in temperatures
        }
        for data in names
        if len(temperatures) > 1
    }
    found["batch"] = {
        data: {f"{batch} (rate {rate:g})": figures for batch, (rate, figures) in batches.items()}
        for data, batches in tuned(rows).items()
    }
    return {
        question: whole
        for question, sets in found.items()
        if (whole := {data: figures for data, figures in sets.items() if figures and all(figures.values())})
    }


def page(rows: Sequence[Row], found: dict[str, dict[str, dict[str, dict[int, float]]]], figures: Path) -> str:
    """Return the page: a chart and a table for each question."""
    steps = sorted({row["steps"] for row in rows if row["steps"]})
    lines = [
        "# What each thing buys",
        "",
        "Short trainings of MiniLM that differ in one setting:",
        f"{', '.join(map(str, steps))} steps at batch 256 unless a",
        "table says otherwise, rate 1.5e-4, temperature 0.02, texts of at most 128 tokens. Test",
        "split, whole corpus; mean over seeds ± standard deviation, differences seed by seed. Null is a difference of",
        "at most twice its standard error. `python -m benchmarks.gain` makes the figures, and its `report` this page",
        f"([every figure](../{figures.as_posix()})).",
        "",
    ]
    for question, sets in found.items():
        lines += [f"## {TITLES[question]}", "", f"![{TITLES[question]}](assets/gain_{question}.png)", ""]
        lines += [f"| {MEASURE} | setting | seeds | test | against the first |", "|---|---|---|---|---|"]
        for data, settings in sets.items():
            base = next(iter(settings.values()))
            for name, by in settings.items():
                against = "" if by is base else difference(base, by)
                lines.append(f"| {data} | {name} | {len(by)} | {spread(list(by.values()))} | {against} |")
        lines.append("")
    missing = [title for question, title in TITLES.items() if question not in found]
    if missing:
        lines += [f"Not measured yet: {'; '.join(missing)}.", ""]
    return "\n".join(lines)


def chart(question: str, sets: dict[str, dict[str, dict[int, float]]], output: Path) -> None:
    """Draw a panel for each data set: the seeds as points, their mean as a line."""
    figure, axes = plt.subplots(1, len(sets), figsize=(3.2 * len(sets), 3), squeeze=False, layout="constrained")
    for axis, (data, settings) in zip(axes[0], sets.items(), strict=True):
        for place, figures in enumerate(settings.values()):
            values = list(figures.values())
            axis.plot([place] * len(values), values, "o", color="tab:blue", alpha=0.6)
            axis.hlines(statistics.mean(values), place - 0.25, place + 0.25, color="black")
        axis.set_xticks(range(len(settings)), [name.replace(" (", "\n(") for name in settings], fontsize=7)
        axis.set_xlim(-0.5, len(settings) - 0.5)
        axis.set_title(data, fontsize=9)
        axis.grid(axis="y", alpha=0.3)
    axes[0][0].set_ylabel(f"test {MEASURE}")
    figure.suptitle(TITLES[question], fontsize=10)
    figure.savefig(output / "assets" / f"gain_{question}.png", dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="folder of gain.md and assets/gain_QUESTION.png")
    args = parser.parse_args()
    rows = load(args.figures)
    found = compared(rows)
    (args.output / "assets").mkdir(parents=True, exist_ok=True)
    (args.output / "gain.md").write_text(page(rows, found, args.figures))
    for question, sets in found.items():
        chart(question, sets, args.output)


if __name__ == "__main__":
    main()
