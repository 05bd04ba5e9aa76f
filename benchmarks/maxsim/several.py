"""What do the tokens of other ranks cost, packed and padded?

    torchrun --nproc-per-node 2 -m benchmarks.maxsim.several [--shape ...] [--output FILE]

A rank has the shape's queries and passages, ragged as in `benchmarks.maxsim`. Rows: our gather and ring, in which real
tokens alone travel, and our loss over `dist_gather_tensor_with_dim1_padding`, which pads to the longest rank. First
loss and gradients are compared with those of one process that has everything. mib_in is what the vectors of other ranks
take on their way to one rank, forward; the backward pass sends as many numbers back (the ring: both, in float32).
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.maxsim.measure import inputs
from inbatch import collectives, info_nce
from inbatch.inbatch_neg_utils import dist_gather_tensor_with_dim1_padding, positive_columns

SHAPE = [128, 1024, 32, 180] if torch.cuda.is_available() else [16, 64, 16, 60]


def packed(queries: Tensor, passages: Tensor, query_mask: Tensor, passage_mask: Tensor, negatives: str) -> Tensor:
    masks = {"query_mask": query_mask, "passage_mask": passage_mask}
    return info_nce(queries, passages, temperature=1.0, negatives=negatives, **masks)  # pyright: ignore[reportArgumentType]


def padded(queries: Tensor, passages: Tensor, query_mask: Tensor, passage_mask: Tensor, _: str) -> Tensor:
    everyone = dist_gather_tensor_with_dim1_padding(passages, preserve_grad=True)
    mask = dist_gather_tensor_with_dim1_padding(passage_mask)
    positives = positive_columns(len(queries), len(passages) // len(queries), queries.device)
    masks = {"query_mask": query_mask, "passage_mask": mask}
    return info_nce(queries, everyone, temperature=1.0, negatives="local", positives=positives, **masks)  # pyright: ignore


ROWS = {"inbatch, gather": (packed, "gather"), "inbatch, ring": (packed, "ring"), "padded gather": (padded, "")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=4, default=SHAPE, help="of one rank")
    parser.add_argument("--dimension", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path, help="JSON lines to append the results to")
    args = parser.parse_args()
    collectives.start()
    rank, ranks = collectives.rank(), collectives.world_size()
    alone = [dist.new_group([other]) for other in range(ranks)][rank]
    queries, passages, *shape = args.shape
    everything = inputs([queries * ranks, passages * ranks, *shape], args)
    mine = [slice(rank * rows, (rank + 1) * rows) for rows in (queries, passages)] * 2
    given = [tensor[some].detach() for tensor, some in zip(everything, mine, strict=True)]
    # As a collator pads: to the longest of the rank.
    given[1], given[3] = (side[:, : int(given[3].sum(1).max())].contiguous() for side in given[1::2])
    leaves = [side.requires_grad_() for side in given[:2]]
    whole = info_nce(
        *everything[:2], query_mask=everything[2], passage_mask=everything[3], temperature=1.0, group=alone
    )
    wanted = [whole.detach(), *torch.autograd.grad(whole, everything[:2])]
    wanted = [wanted[0], *(side[some] for side, some in zip(wanted[1:], mine, strict=False))]
    wanted[2] = wanted[2][:, : given[1].shape[1]]
    numbers = given[1].shape[2] * given[1].element_size() / 2**20
    tokens = collectives.gather_rows(given[3].sum()[None], [1] * ranks, None).tolist()
    widths = collectives.gather_rows(torch.tensor([given[1].shape[1]], device=given[1].device), [1] * ranks, None)
    others = {"packed": sum(tokens) - tokens[rank], "padded": (ranks - 1) * passages * int(widths.max())}
    for name, (row, negatives) in ROWS.items():
        loss = row(*given, negatives)
        everywhere = collectives.gather_rows(loss.detach()[None], [1] * ranks, None).mean()
        found = [everywhere, *(side / ranks for side in torch.autograd.grad(loss, leaves))]
        error = max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))
        times = []
        for _ in range(args.repeats + 1):
            dist.barrier()
            start = time.perf_counter()
            torch.autograd.grad(row(*given, negatives), leaves)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(1000 * (time.perf_counter() - start))
        line = {
            "row": name, "ranks": ranks, "shape": args.shape, "dtype": args.dtype, "error": float(f"{error:.1e}"),
            "mib_in": round(others[row.__name__] * numbers, 2), "ms": round(statistics.median(times[1:]), 3),
        }  # fmt: skip
        if rank == 0:
            print(json.dumps(line), flush=True)
            if args.output:
                with args.output.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    collectives.stop()


if __name__ == "__main__":
    main()
