"""One cell of benchmarks.gain: train, measure, and leave nothing behind."""

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gain.cells import MEASURES, Cell
from inbatch import collectives
from inbatch.data import RetrievalData, load_retrieval
from inbatch.encoder.model import BiEncoderModel
from inbatch.encoder.packing import wish
from inbatch.retrieval.embed import EmbedOptions
from inbatch.retrieval.evaluate import RetrieveOptions, retrieve
from inbatch.retrieval.metrics import retrieval_metrics
from inbatch.train.config import Config, DataConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig
from inbatch.train.loop import train

QUERY_MAX_LEN = 64
PROBE = 12  # steps, the second half of which says how long a step takes


def trained(cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of a cell, or why there are none; every rank calls it where ranks train together."""
    place = args.output / "work" / ("together" if cell.processes > 1 else str(os.getpid()))
    start = time.perf_counter()
    try:
        run = train_peer if cell.library != "inbatch" else train_ours
        model, about = run(cell, args, place)
        figures = measured(model, cell.data, args)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:500]}
    finally:
        collectives.on_rank_0(lambda: shutil.rmtree(place, ignore_errors=True))
    return {**about, **figures, "wall_s": round(time.perf_counter() - start, 1)}


def train_ours(cell: Cell, args: argparse.Namespace, place: Path) -> tuple[Path, dict[str, Any]]:
    steps = cell.steps
    if steps is None:
        train(config_of(cell, args, place / "probe", 2 * PROBE, log_every=PROBE))
        assert cell.seconds is not None
        steps = max(1, round(cell.seconds / (1e-3 * last_speed(place / "probe")["step_ms"])))
    train(config_of(cell, args, place / "run", steps))
    return place / "run" / "model", {"steps_done": steps, "train_s": last_speed(place / "run")["train_s"]}


def last_speed(folder: Path) -> dict[str, float]:
    return json.loads((folder / "speed.jsonl").read_text().splitlines()[-1])


def config_of(cell: Cell, args: argparse.Namespace, output: Path, steps: int, log_every: int = 1000) -> Config:
    return Config(
        model=ModelConfig(name_or_path=args.model),
        data=DataConfig(
            train=cell.data, query_max_len=QUERY_MAX_LEN, passage_max_len=args.passage_max_len, train_n_passages=1,
            token_cache=str(args.output / "tokens"), num_workers=None if cell.seconds else 0,
        ),
        loss=LossConfig(
            temperature=cell.temperature, negatives=cell.negatives, detach_remote=cell.detach_remote,
            mask_duplicates=cell.masks,
        ),
        optim=OptimConfig(lr=cell.lr),
        train=TrainConfig(
            output_dir=str(output), seed=cell.seed, global_batch_size=cell.batch, max_steps=steps, log_every=log_every,
            progress=False, loggers=[], precision=cell.precision if torch.cuda.is_available() else "auto",
        ),
    )  # fmt: skip


def train_peer(cell: Cell, args: argparse.Namespace, place: Path) -> tuple[Path, dict[str, Any]]:
    """Train with sentence-transformers' trainer and cached loss, in bfloat16 on a GPU."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Note when each step ended."""

        def __init__(self) -> None:
            self.at: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available() and len(self.at) in (PROBE - 1, 2 * PROBE - 1):
                torch.cuda.synchronize()
            self.at.append(time.perf_counter())

    data = load_retrieval(cell.data, "train")
    query_of, row_of = dict(zip(data.query_ids, data.queries, strict=True)), {k: i for i, k in enumerate(data.doc_ids)}
    pairs = [(query, doc) for query, judged in data.qrels.items() for doc, grade in judged.items() if grade > 0]
    columns = {"query": [query_of[query] for query, _ in pairs], "doc": [data.documents[row_of[d]] for _, d in pairs]}
    gpu = torch.cuda.is_available()

    def run(steps: int) -> tuple[SentenceTransformer, Clock, float]:
        torch.manual_seed(cell.seed)
        model = SentenceTransformer(args.model, device=str(collectives.device()))
        model.max_seq_length = args.passage_max_len
        loss = CachedMultipleNegativesRankingLoss(
            model, scale=1 / cell.temperature, mini_batch_num_tokens=args.mini_batch_num_tokens
        )
        how = Arguments(
            output_dir=str(place / "peer"), per_device_train_batch_size=cell.batch, max_steps=steps, bf16=gpu,
            learning_rate=cell.lr, warmup_steps=round(0.1 * steps), weight_decay=0.01, seed=cell.seed,
            dataloader_num_workers=8 if gpu else 0,  # as many as inbatch takes at most
            logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=not gpu,
        )  # fmt: skip
        clock = Clock()
        trainer = SentenceTransformerTrainer(
            model=model, args=how, train_dataset=Dataset.from_dict(columns), loss=loss, callbacks=[clock]
        )
        return model, clock, trainer.train().metrics["train_runtime"]

    at = run(2 * PROBE)[1].at
    steps = max(1, round(args.seconds * PROBE / (at[-1] - at[PROBE - 1])))
    model, _, train_s = run(steps)
    model.save_pretrained(str(place / "model"))
    return place / "model", {"steps_done": steps, "train_s": train_s}


def both_splits(folder: str) -> tuple[RetrievalData, dict[str, RetrievalData]]:
    """Return the queries of dev and test as one set, so that the corpus is embedded once, and each alone."""
    splits = {split: load_retrieval(folder, split) for split in ("dev", "test")}
    dev, test = splits.values()
    return RetrievalData(
        query_ids=[*dev.query_ids, *test.query_ids],
        queries=[*dev.queries, *test.queries],
        doc_ids=test.doc_ids,
        documents=test.documents,
        qrels={**dev.qrels, **test.qrels},
    ), splits


def measured(model: Path, folder: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the measures of a saved model on dev and test; every rank calls it."""
    device = collectives.device()
    data, splits = both_splits(folder)
    encoder = BiEncoderModel.from_pretrained(model, dtype=torch.float32, packed=wish(None, device)).to(device).eval()
    options = RetrieveOptions(
        query_max_len=QUERY_MAX_LEN,
        passage_max_len=args.passage_max_len,
        similarity="cosine",
        embedding=EmbedOptions(precision="autocast" if device.type == "cuda" else "fp32"),
    )
    found = retrieve(encoder, data, options)
    return {
        name: retrieval_metrics({query: found[query] for query in split.query_ids}, split.qrels, MEASURES)
        for name, split in splits.items()
    }
