"""How long does measuring retrieval take, from texts to nDCG@10? Beside sentence-transformers' own evaluator.

    python -m benchmarks.evaluate --model FOLDER --data FOLDER
    python -m benchmarks.evaluate --model FOLDER --documents 200 --queries 20     a trial on a CPU

Each row is a process of its own, begun to ended: imports, opening model and data, tokenising, encoding, searching. Both
compute in bfloat16 on a GPU (by copies of the weights here, by weights there) and in float32 on a CPU, and both must
give the same nDCG@10, to what the precision allows. sentence-transformers runs with each batch size given, and
the last line compares with its best. "in it" is without imports and opening.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MEASURE = "nDCG@10"


def run_inbatch(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from inbatch import BiEncoderModel
    from inbatch.data import load_retrieval
    from inbatch.encoder.packing import wish
    from inbatch.retrieval.embed import EmbedOptions
    from inbatch.retrieval.evaluate import RetrieveOptions, evaluate

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = load_retrieval(args.data, args.split)
    model = BiEncoderModel.from_pretrained(args.model, dtype=torch.float32, packed=wish(None, device)).to(device)
    start = time.perf_counter()
    embedding = EmbedOptions(precision="bf16" if device.type == "cuda" else "fp32")
    options = RetrieveOptions(
        embedding=embedding, query_max_len=args.max_length, passage_max_len=args.max_length, similarity="cosine"
    )
    figures = evaluate(model, data, options, measures=[MEASURE])
    return {"in_it_s": time.perf_counter() - start, MEASURE: figures[MEASURE], "documents": len(data.doc_ids)}


def run_sentence_transformers(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.evaluation import InformationRetrievalEvaluator

    from inbatch.data import load_retrieval

    gpu = torch.cuda.is_available()
    data = load_retrieval(args.data, args.split)
    dtype = torch.bfloat16 if gpu else torch.float32
    model = SentenceTransformer(args.model, device="cuda" if gpu else "cpu", model_kwargs={"dtype": dtype})
    model.max_seq_length = args.max_length
    start = time.perf_counter()
    relevant = {query: {doc for doc, grade in row.items() if grade > 0} for query, row in data.qrels.items()}
    evaluator = InformationRetrievalEvaluator(
        dict(zip(data.query_ids, data.queries, strict=True)),
        dict(zip(data.doc_ids, data.documents, strict=True)),
        relevant,
        ndcg_at_k=[10],
        batch_size=args.batch_size,
        main_score_function="cosine",
        write_csv=False,
    )
    figures = evaluator(model)
    found = next(value for name, value in figures.items() if name.endswith("cosine_ndcg@10"))
    return {"in_it_s": time.perf_counter() - start, MEASURE: float(found), "documents": len(data.doc_ids)}


def cut(args: argparse.Namespace, folder: Path) -> Path:
    """Write a smaller BEIR folder: the first queries, what is relevant to them, and the first other documents."""
    from inbatch.data import load_retrieval

    data = load_retrieval(args.data, args.split)
    queries = [(key, text) for key, text in zip(data.query_ids, data.queries, strict=True) if key in data.qrels]
    queries = queries[: args.queries]
    wanted = {doc for key, _ in queries for doc in data.qrels[key]}
    rows = sorted(range(len(data.doc_ids)), key=lambda row: data.doc_ids[row] not in wanted)[: args.documents]
    (folder / "qrels").mkdir()
    write_jsonl(folder / "queries.jsonl", [{"_id": key, "text": text} for key, text in queries])
    write_jsonl(folder / "corpus.jsonl", [{"_id": data.doc_ids[row], "text": data.documents[row]} for row in rows])
    kept = {data.doc_ids[row] for row in rows}
    lines = [f"{key}\t{doc}\t{grade}\n" for key, _ in queries for doc, grade in data.qrels[key].items() if doc in kept]
    (folder / "qrels" / f"{args.split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


def write_jsonl(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def measure(library: str, batch_size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run one row in a process of its own."""
    options = ["--model", args.model, "--data", str(args.data), "--split", args.split]
    options += ["--max-length", str(args.max_length), "--batch-size", str(batch_size), "--one", library]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.evaluate", *options], capture_output=True, text=True, env=os.environ
    )
    wall_s = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{library} failed:\n{done.stderr[-2000:]}")
    return {"library": library, "batch_size": batch_size, "wall_s": wall_s} | json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, default=ROOT / "examples" / "pystdlib", help="a BEIR folder")
    parser.add_argument("--split", default="test")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 128, 512], help="of sentence-transformers")
    parser.add_argument("--documents", type=int, help="only so many of the corpus")
    parser.add_argument("--queries", type=int, help="only so many of the judged queries")
    parser.add_argument("--json", type=Path, help="append each row as a JSON line to this file")
    parser.add_argument("--batch-size", type=int, default=32, help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        row = run_inbatch(args) if args.one == "inbatch" else run_sentence_transformers(args)
        print(json.dumps(row))
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.documents or args.queries:
            args.data = cut(args, Path(folder))
        plan = [("inbatch", 0), *(("sentence-transformers", size) for size in args.batch_sizes)]
        rows = [measure(library, size, args) for library, size in plan]
    for row in rows:
        name = row["library"] + (f", batch {row['batch_size']}" if row["batch_size"] else "")
        print(f"{name:36} {row['wall_s']:7.1f} s, in it {row['in_it_s']:7.1f} s, {MEASURE} {row[MEASURE]:.4f}")
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps({"data": args.data.name, **row}) + "\n")
    best = min(rows[1:], key=lambda row: row["wall_s"])
    print(
        f"{rows[0]['documents']} documents: inbatch is {best['wall_s'] / rows[0]['wall_s']:.2f} times as fast as "
        f"sentence-transformers at its best, batch {best['batch_size']}"
    )


if __name__ == "__main__":
    main()
