"""How well, and how fast, is a late-interaction model trained here, beside sentence-transformers' MultiVectorEncoder?

    python -m benchmarks.late --model MINILM --data MEDQUAD --output FOLDER
    ... --steps 2 --batch 8 --queries 20 --documents 99     a trial on a CPU

Both rows begin with the same folder, of which sentence-transformers must give the same
scores: the model with a new projection, "[Q] " and "[D] ", mask tokens to 32 and 256 tokens of a document. Both train
on the same pairs with AdamW, a tenth of warm-up and linear decay, in bfloat16 autocast on a GPU. Both models are then
measured by `inbatch evaluate`'s search, exact over all documents. Each row is a process of its own; training_s is
from the first step's data to the last step, without imports and opening.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MEASURE = "nDCG@10"
QUERY_LENGTH, DOCUMENT_LENGTH = 32, 256


def begin(args: argparse.Namespace) -> dict[str, Any]:
    """Save the model that both rows begin with, and return how far sentence-transformers' scores are from ours."""
    import torch
    from sentence_transformers import MultiVectorEncoder

    from inbatch import BiEncoderModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = BiEncoderModel.from_pretrained(args.model, pooling="multi_vector", dtype=torch.float32).eval()
    model.query_length, model.document_length = QUERY_LENGTH, DOCUMENT_LENGTH
    model.save_pretrained(args.output / "begin")
    texts = {"query": ["what is glaucoma?", "flu"], "document": ["Glaucoma is a disease of the eye.", "A virus."]}
    with torch.no_grad():
        sides = {task: model(model.to_device(model.tokenize(some, task=task))) for task, some in texts.items()}
    queries, documents = ([text[text.any(-1)] for text in side] for side in sides.values())
    ours = torch.tensor([[float((q @ d.T).amax(1).sum()) for d in documents] for q in queries])
    theirs = MultiVectorEncoder(str(args.output / "begin"), device="cpu")
    scores = theirs.similarity(theirs.encode_query(texts["query"]), theirs.encode_document(texts["document"]))
    return {"row": "begin", "largest difference of scores": float((ours - scores).abs().max())}


def run_inbatch(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from inbatch.train.config_file import load
    from inbatch.train.loop import train

    settings = {
        "model.name_or_path": str(args.output / "begin"),
        "data.train": str(args.data),
        "data.query_max_len": QUERY_LENGTH,
        "data.passage_max_len": DOCUMENT_LENGTH,
        "eval.data": "null",
        "train.output_dir": str(args.output / "inbatch"),
        "train.global_batch_size": args.batch,
        "train.epochs": args.epochs,
        "train.max_steps": args.steps or "null",
        "train.loggers": "[]",
        "train.progress": "false",
        "optim.lr": args.lr,
    }
    config = load(
        ROOT / "configs" / "late_interaction.yaml",
        [x for key, value in settings.items() for x in (f"--{key}", str(value))],
    )
    train(config, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    lines = [json.loads(line) for line in (args.output / "inbatch" / "speed.jsonl").read_text().splitlines()]
    return {
        "speed": {"training_s": lines[-1]["train_s"], **lines[-1]},
        "folder": str(args.output / "inbatch" / "model"),
    }


def run_sentence_transformers(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.multi_vector_encoder import (
        MultiVectorEncoderTrainer,
        MultiVectorEncoderTrainingArguments,
    )
    from sentence_transformers.multi_vector_encoder.losses import CachedMultiVectorMultipleNegativesRankingLoss
    from transformers import TrainerCallback

    from inbatch.data import open_examples

    # Set by a user to true, it makes forked workers wait for threads of the tokenizer that they do not have.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gpu = torch.cuda.is_available()
    model = MultiVectorEncoder(str(args.output / "begin"), device="cuda" if gpu else "cpu")
    examples = open_examples([{"path": str(args.data)}], split="train", seed=42)
    pairs = [(example.query, example.positives[0].full_text) for example in examples]
    data = Dataset.from_dict({"query": [pair[0] for pair in pairs], "document": [pair[1] for pair in pairs]})
    arguments = MultiVectorEncoderTrainingArguments(
        output_dir=str(args.output / "sentence-transformers" / "run"),
        per_device_train_batch_size=args.batch,
        num_train_epochs=args.epochs,
        max_steps=args.steps or -1,
        learning_rate=args.lr,
        weight_decay=0.01,
        warmup_ratio=0.1,
        lr_scheduler_type="linear",
        bf16=gpu,
        use_cpu=not gpu,
        batch_sampler="no_duplicates",
        dataloader_num_workers=8 if gpu else 0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=42,
    )

    class Clock(TrainerCallback):
        begun = ended = 0.0

        def on_train_begin(self, *_, **__):
            self.begun = time.perf_counter()

        def on_train_end(self, *_, **__):
            self.ended = time.perf_counter()

    clock = Clock()
    loss = CachedMultiVectorMultipleNegativesRankingLoss(
        model, mini_batch_size=args.mini_batch, score_mini_batch_size=args.mini_batch
    )
    trainer = MultiVectorEncoderTrainer(model=model, args=arguments, train_dataset=data, loss=loss, callbacks=[clock])
    trainer.train()
    folder = args.output / "sentence-transformers" / "model"
    model.save_pretrained(str(folder))
    return {
        "speed": {"training_s": clock.ended - clock.begun},
        "steps": trainer.state.global_step,
        "folder": str(folder),
    }


def measure(folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return what the saved model finds."""
    import torch

    from inbatch.data import load_retrieval
    from inbatch.data.judged import sample
    from inbatch.encoder.packing import wish
    from inbatch.encoder.sentence_transformer import open_encoder
    from inbatch.retrieval.embed import EmbedOptions
    from inbatch.retrieval.evaluate import RetrieveOptions, evaluate

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = load_retrieval(args.data, args.split)
    if args.documents or args.queries:
        data = sample(data, args.queries, args.documents)
    model = open_encoder(folder, dtype=torch.float32, packed=wish(None, device)).to(device)
    start = time.perf_counter()
    embedding = EmbedOptions(precision="autocast" if device.type == "cuda" else "fp32")
    figures = evaluate(model, data, RetrieveOptions(embedding=embedding), measures=[MEASURE, "R@100"])
    return {**figures, "evaluation_s": time.perf_counter() - start, "documents": len(data.doc_ids)}


ROWS = {"inbatch": run_inbatch, "sentence-transformers": run_sentence_transformers}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of all-MiniLM-L6-v2, or another encoder")
    parser.add_argument("--data", type=Path, required=True, help="folder in BEIR layout with training and test qrels")
    parser.add_argument("--output", type=Path, required=True, help="new folder for the models and results.jsonl")
    parser.add_argument("--split", default="test")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--mini-batch", type=int, default=128, help="of sentence-transformers' cached loss")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, help="in place of the epochs")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--documents", type=int, help="measure on so many only")
    parser.add_argument("--queries", type=int)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--row", choices=["begin", *ROWS], help=argparse.SUPPRESS)
    return parser.parse_args()


def run_row(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    found = begin(args) if args.row == "begin" else ROWS[args.row](args)
    if args.row != "begin":
        found |= {"row": args.row, "batch": args.batch, "trained_s": time.perf_counter() - start}
        found |= measure(found["folder"], args)
    with (args.output / "results.jsonl").open("a") as file:
        file.write(json.dumps(found) + "\n")


def main() -> None:
    args = parse()
    if args.row:
        return run_row(args)
    if args.output.exists():
        raise SystemExit(f"{args.output} exists: name a new folder")
    args.output.mkdir(parents=True)
    for row in ["begin", *args.rows]:
        subprocess.run([sys.executable, "-m", "benchmarks.late", *sys.argv[1:], "--row", row], check=True, cwd=ROOT)
    rows = [json.loads(line) for line in (args.output / "results.jsonl").read_text().splitlines()]
    print(f"largest difference of scores at the beginning: {rows[0]['largest difference of scores']:.1e}\n")
    print(f"| row | {MEASURE} | R@100 | training s | evaluation s |\n|---|---|---|---|---|")
    for row in rows[1:]:
        print(
            f"| {row['row']} | {row[MEASURE]:.4f} | {row['R@100']:.4f} | {row['speed']['training_s']:.1f} | "
            f"{row['evaluation_s']:.1f} |"
        )


if __name__ == "__main__":
    main()
