"""How long does opening training data take, the first time and later, and how much memory? Several ranks ask at once.

    python -m benchmarks.opening --records 10000000
    python -m benchmarks.opening --records 1000000 --kind beir

Records of one query, one positive and one negative, made up of 48 words; beir: as many documents and queries, a
judgement each. "CPU" is of all processes together. Resident memory is of a rank when it has opened the data and read a
batch of 4096, its peak in parentheses; what importing inbatch.data takes is part of it.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path

ready: Barrier


def sentences(count: int) -> Iterator[tuple[str, str, str]]:
    """Yield a query, a positive and a negative, `count` times; no two queries or positives are equal."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 9))) for _ in range(5000)]
    some = [tuple(" ".join(rng.choices(words, k=k)) for k in (8, 20, 20)) for _ in range(1000)]
    for number in range(count):
        query, positive, negative = some[number % 1000]
        yield f"{number} {query}", f"{number} {positive}", negative


def write(folder: Path, kind: str, count: int) -> Path:
    if kind == "inline":
        with (folder / "records.jsonl").open("w") as file:
            for query, positive, negative in sentences(count):
                file.write(f'{{"query": "{query}", "pos": ["{positive}"], "neg": ["{negative}"]}}\n')
        return folder / "records.jsonl"
    (folder / "qrels").mkdir()
    with (
        (folder / "corpus.jsonl").open("w") as corpus,
        (folder / "queries.jsonl").open("w") as queries,
        (folder / "qrels" / "train.tsv").open("w") as qrels,
    ):
        for number, (query, positive, _) in enumerate(sentences(count)):
            corpus.write(f'{{"_id": "d{number}", "text": "{positive}"}}\n')
            queries.write(f'{{"_id": "q{number}", "text": "{query}"}}\n')
            qrels.write(f"q{number}\td{number}\t1\n")
    return folder


def open_once(source: Path, ranks: int, records: int) -> dict:
    global ready
    context = multiprocessing.get_context("fork")  # of a process that has imported nothing of ours
    ready = context.Barrier(ranks)
    with ProcessPoolExecutor(ranks, context) as executor:
        found = list(executor.map(rank_main, [source] * ranks, [records] * ranks))
    return {name: max(one[name] for one in found) for name in found[0]} | {"cpu_s": sum(one["cpu_s"] for one in found)}


def rank_main(source: Path, records: int) -> dict[str, float]:
    from inbatch.data import open_examples
    from inbatch.data.plan import BatchPlan

    before_mib = resident_mib()
    ready.wait()
    start, cpu_s = time.perf_counter(), cpu_seconds()
    examples = open_examples(source)
    opened_s = time.perf_counter() - start
    assert len(examples) == records, (len(examples), records)
    batch = [examples[row] for row in BatchPlan(len(examples), 4096).batch(0).tolist()]
    assert len({example.query for example in batch}) == min(records, 4096)
    return {
        "opened_s": opened_s,
        "batch_s": time.perf_counter() - start - opened_s,
        "cpu_s": cpu_seconds() - cpu_s,
        "imported_mib": before_mib,
        "resident_mib": resident_mib(),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--ranks", type=int, default=4, help="processes that open the data at once")
    parser.add_argument("--kind", choices=("inline", "beir"), default="inline")
    parser.add_argument("--folder", type=Path, help="where the data are made, and deleted again; default: temporary")
    parser.add_argument("--json", type=Path, help="append each row as a JSON line to this file")
    args = parser.parse_args()
    print(f"{len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, {args.ranks} ranks")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = write(Path(folder), args.kind, args.records)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        for time_ in ("first", "second"):
            figures = open_once(source, args.ranks, args.records)
            print(
                f"{args.records} {args.kind} records, {size / 1e9:.2f} GB, {time_} time: {figures['opened_s']:.2f} s "
                f"(CPU {figures['cpu_s']:.1f} s), first batch {figures['batch_s']:.2f} s, "
                f"{figures['imported_mib']:.0f} -> {figures['resident_mib']:.0f} MiB (peak {figures['peak_mib']:.0f})"
            )
            if args.json:
                about = {"records": args.records, "kind": args.kind, "ranks": args.ranks, "time": time_}
                with args.json.open("a") as file:
                    file.write(json.dumps({**about, **figures}) + "\n")


if __name__ == "__main__":
    main()
