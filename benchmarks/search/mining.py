"""Is mining exact, and what does it hold, at a million documents? On a CPU or a GPU, one process or several.

    python -m benchmarks.search.mining --documents 1000000 --queries 500
    torchrun --nproc-per-node 2 -m benchmarks.search.mining

Documents lie around few centres, so that scores are close, and one in a thousand is a copy of another. Each rank makes
its share; `search_negatives` finds the best for each query less its positives. Rank 0 then makes all documents anew,
a block at a time, scores them in float64 with a plain product and keeps the best by torch.topk. Scores must be equal
bit for bit, and so must documents, but for those whose scores are equal. Memory is the growth of the process's largest
size while it searches, embeddings included, beside the bytes of its share.
"""

import argparse
import json
import resource
import time

import torch
from torch import Tensor
from torch.nn.functional import normalize

from inbatch import collectives
from inbatch.data.plan import share
from inbatch.retrieval.mine import MiningSet, search_negatives

BLOCK = 1 << 14


def block_of(number: int, rows: int, dimension: int) -> Tensor:
    """Return a block of documents, always the same."""
    chance = torch.Generator().manual_seed(1000 + number)
    centres = torch.randn(50, dimension, generator=torch.Generator().manual_seed(0))
    block = centres[torch.randint(50, (rows,), generator=chance)] + torch.randn(rows, dimension, generator=chance)
    block[::1000] = block[0]
    return normalize(block, dim=1)


def documents_of(rows: range, dimension: int) -> Tensor:
    """Return a share of the documents, held once."""
    documents = torch.empty(len(rows), dimension)
    for number in range(rows.start // BLOCK, -(-rows.stop // BLOCK)):
        start, stop = max(rows.start, number * BLOCK), min(rows.stop, (number + 1) * BLOCK)
        block = block_of(number, BLOCK, dimension)
        documents[start - rows.start : stop - rows.start] = block[start - number * BLOCK : stop - number * BLOCK]
    return documents


def brute_force(queries: Tensor, positives: Tensor, count: int, k: int) -> tuple[Tensor, Tensor]:
    """Return scores and documents [Q, k] of products of everything in float64, rounded, blocks one after the other."""
    best, where, queries = (
        torch.empty(len(queries), 0),
        torch.empty(len(queries), 0, dtype=torch.int64),
        queries.double(),
    )
    for start in range(0, count, BLOCK):
        block = block_of(start // BLOCK, BLOCK, queries.shape[1])[: count - start].double()
        lengths = queries.norm(dim=1)[:, None] * block.norm(dim=1)
        scores = (queries @ block.T / lengths).float()
        here = (positives >= start) & (positives < start + len(block))
        scores[here.nonzero()[:, 0], positives[here] - start] = -torch.inf
        best, places = torch.cat([best, scores], dim=1).topk(k, dim=1)
        columns = torch.arange(start, start + len(block)).expand(len(queries), -1)
        where = torch.cat([where, columns], dim=1).gather(1, places)
    return best, where


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--k", type=int, default=100)
    args = parser.parse_args()
    device = collectives.start(None if torch.cuda.is_available() else "gloo", timeout_s=3600)
    mine = share(args.documents, collectives.rank(), collectives.world_size())
    chance = torch.Generator().manual_seed(1)
    queries = block_of(-1, BLOCK, args.dimension)[: args.queries].clone()
    positives = torch.randint(args.documents, (args.queries, 2), generator=chance)
    data = MiningSet(
        queries=[""] * args.queries,
        documents=[""] * args.documents,
        positives=[sorted({*pair}) for pair in positives.tolist()],
        same=[[]] * args.queries,
    )
    before_mib = peak_mib()
    documents = documents_of(mine, args.dimension)
    start = time.perf_counter()
    found = []
    for first in range(0, args.queries, 4096):
        rows = range(first, min(args.queries, first + 4096))
        found.append(search_negatives(rows, queries[first : rows.stop].to(device), documents, data, args.k))
    search_s, held_mib, share_mib = time.perf_counter() - start, peak_mib() - before_mib, documents.nbytes / 2**20
    if collectives.rank() == 0:
        scores, indices = (torch.cat([block[place] for block in found]) for place in (1, 2))
        start = time.perf_counter()
        best, where = brute_force(queries, positives, args.documents, args.k)
        brute_s = time.perf_counter() - start
        # Equal scores have an order here (the lower document first), and none in torch.topk.
        tied = (best[:, :, None] == best[:, None, :]).sum(2) > 1
        tied |= best == best[:, -1:]
        differ = int(((where != indices) & ~tied).sum())
        row = {**vars(args), "ranks": collectives.world_size(), "device": str(device), "torch": torch.__version__}
        row |= {"different_scores": int((best != scores).sum()), "different_documents": differ, "tied": int(tied.sum())}
        row |= {"search_s": round(search_s, 1), "brute_force_s": round(brute_s, 1), "share_mib": round(share_mib)}
        row |= {"held_mib": round(held_mib), "held_over_share": round(held_mib / share_mib, 2)}
        print(json.dumps(row))
        assert row["different_scores"] == row["different_documents"] == 0, "mining is not exact"
    collectives.stop()


if __name__ == "__main__":
    main()
