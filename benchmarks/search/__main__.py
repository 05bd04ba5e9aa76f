"""What does exact search cost, beside torch's products and topk in float32, and beside the products alone?

    python -m benchmarks.search --queries 2400 --documents 39000 --dimension 384

`inbatch.retrieval.search.top_k` scores in float64 what a float32 product leaves, and breaks ties by index. The float64
row scores everything so, the float32 row nothing; neither breaks ties. That they find the same documents, but for
rounding, is checked first; then they take turns, in blocks of the same sizes.
Seconds are of the wall, the median of --repeats.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from inbatch.retrieval.search import top_k


def in_float64(queries_QD: Tensor, documents_ND: Tensor, k: int) -> Tensor:
    """Return the indices [Q, k] of the best documents by float64 products of all, rounded, equal ones in any order."""
    return in_float32(queries_QD.double(), documents_ND, k)


def in_float32(queries_QD: Tensor, documents_ND: Tensor, k: int) -> Tensor:
    """Return the indices [Q, k] of the best documents by products in the queries' dtype, equal scores in any order."""
    best: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(documents_ND), 16384):
        block_CD = documents_ND[start : start + 16384].to(queries_QD)
        parts = []
        for row, some_QD in enumerate(queries_QD.split(1024)):
            scores_Qk, columns_Qk = (some_QD @ block_CD.T).float().topk(min(k, len(block_CD)))
            columns_Qk += start
            if best:
                scores_QK = torch.cat([best[row][0], scores_Qk], dim=1)
                scores_Qk, places_Qk = scores_QK.topk(min(k, scores_QK.shape[1]))
                columns_Qk = torch.cat([best[row][1], columns_Qk], dim=1).gather(1, places_Qk)
            parts.append((scores_Qk, columns_Qk))
        best = parts
    return torch.cat([columns_Qk for _, columns_Qk in best])


def products(queries_QD: Tensor, documents_ND: Tensor, k: int) -> None:
    for start in range(0, len(documents_ND), 16384):
        block_CD = documents_ND[start : start + 16384].to(queries_QD.device)
        for some_QD in queries_QD.split(1024):
            some_QD @ block_CD.T


def seconds(function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=2400)
    parser.add_argument("--documents", type=int, default=39000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON lines to append the row to")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    queries_QD, documents_ND = (
        torch.randn(rows, args.dimension, generator=generator, device=device) for rows in (args.queries, args.documents)
    )
    for block_CD in (*queries_QD.split(1 << 20), *documents_ND.split(1 << 20)):
        block_CD.div_(block_CD.norm(dim=1, keepdim=True))
    exact, rough = top_k(queries_QD, documents_ND, args.k)[1], in_float32(queries_QD, documents_ND, args.k)
    assert (exact == rough).double().mean() > 0.99, "the documents differ"
    rows = {"exact": top_k, "float64": in_float64, "float32": in_float32, "products": products}
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(args.repeats):
        for name, function in rows.items():
            times[name].append(seconds(function, queries_QD, documents_ND, args.k))
    settings = {name: getattr(args, name) for name in ("queries", "documents", "dimension", "k", "repeats")}
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    row = {**settings, "device": name, "torch": torch.__version__}
    row |= {f"{name}_s": round(statistics.median(values), 3) for name, values in times.items()}
    print(json.dumps(row))
    if args.output:
        with args.output.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
