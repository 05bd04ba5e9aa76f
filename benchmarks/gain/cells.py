"""Which trainings answer which question of benchmarks.gain."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

ALONE = ("clock", "masks", "temperature", "batch", "precision")
TOGETHER = ("negatives", "gradient")
MEASURES = ("nDCG@10", "R@100", "RR@10")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training. Its settings are its identity, so that questions share it."""

    data: str
    seed: int
    batch: int
    lr: float
    steps: int | None
    passage_max_len: int
    processes: int = 1
    negatives: Literal["gather", "local"] = "gather"
    detach_remote: bool = False
    masks: bool | Literal["positive"] = True
    temperature: float = 0.02
    library: str = "inbatch"
    precision: str = "autocast"
    seconds: float | None = None

    @property
    def key(self) -> str:
        return json.dumps({**asdict(self), "data": Path(self.data).name}, sort_keys=True)


def cells(args: argparse.Namespace, questions: tuple[str, ...]) -> list[Cell]:
    """Return the cells of some questions, seed by seed."""

    def of(question: str, data: str, seed: int) -> Iterator[Cell]:
        def cell(**changes: Any) -> Cell:
            usual = {"batch": args.batch, "lr": args.lr, "steps": args.steps, "passage_max_len": args.passage_max_len}
            return Cell(**{"data": data, "seed": seed, **usual, **changes})

        if question in TOGETHER:  # the detached gradient goes with masks of the query's own positive only
            changed: dict[str, Any] = {"negatives": "local"} if question == "negatives" else {"detach_remote": True}
            for changes in ({}, changed):
                yield cell(processes=args.gpus, masks="positive", **changes)
        elif question == "masks":
            yield from (cell(masks=masks) for masks in (True, "positive", False))
        elif question == "temperature":
            yield from (cell(temperature=temperature) for temperature in args.temperatures)
        elif question == "precision":
            yield from (cell(precision=precision) for precision in ("autocast", "bf16"))
        elif question == "batch":
            yield from (cell(batch=batch, lr=lr) for batch in args.batches for lr in args.rates)
        else:
            for library in ("inbatch", "sentence-transformers"):
                yield cell(batch=args.clock_batch, seconds=args.seconds, steps=None, library=library)

    listed = [
        c for seed in args.seeds for question in questions for data in args.data for c in of(question, data, seed)
    ]
    return list(dict.fromkeys(listed))
