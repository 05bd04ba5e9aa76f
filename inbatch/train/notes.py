"""What a run says of itself before it starts: how many candidates a query sees and why, and settings that look wrong.

Nobody can see negatives in a loss curve, so the count, what it is made of and what takes away from it are spelled out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inbatch import collectives
from inbatch.data.batches import Part
from inbatch.train.config import Config


@dataclass(frozen=True, kw_only=True)
class FirstBatch:
    """The first part of the first step, over all ranks."""

    queries: list[int]  # by rank
    passages: list[int]  # by rank
    duplicates: float  # share of the queries with another copy of their positive among the passages
    tokens: int  # of this rank, padding included


def look_at(part: Part) -> FirstBatch:
    """Counts over all ranks; every rank calls it."""
    batch = part.batch
    ids = {"queries": batch.query_ids, "passages": batch.passage_ids}
    rows = collectives.agree("the first batch", ids)
    own_ids_B = batch.passage_ids[batch.positives]
    passage_ids_N = collectives.all_gather(batch.passage_ids, rows=rows["passages"])
    twice = collectives.all_reduce(_copies(own_ids_B, passage_ids_N).gt(1).sum())
    return FirstBatch(
        queries=rows["queries"],
        passages=rows["passages"],
        duplicates=int(twice) / max(1, sum(rows["queries"])),
        tokens=batch.queries["input_ids"].numel() + batch.passages["input_ids"].numel(),
    )


def _copies(wanted_B: Tensor, ids_N: Tensor) -> Tensor:
    """How often each wanted id occurs."""
    known_U, counts_U = torch.unique(ids_N, return_counts=True)
    return counts_U[torch.searchsorted(known_U, wanted_B)]


def candidates(config: Config, first: FirstBatch, *, examples: int) -> list[str]:
    """How many passages each query is scored against, and why."""
    ranks, parts = len(first.queries), config.train.accumulation_steps
    everyone = config.loss.negatives != "local"
    seen = sum(first.passages) if everyone else max(first.passages)
    queries = sum(first.queries) if everyone else max(first.queries)
    origin = f"{_each(first.queries)} queries x {_passages(seen, queries)}"
    if ranks > 1:
        origin = f"{ranks} ranks x {origin}" if everyone else f"this rank's {origin}"
    lines = [f"each query sees {seen} candidates: its positive and {seen - 1} negatives ({origin})"]
    if ranks > 1 and not everyone:
        lines.append(
            f"loss.negatives is local: {seen - 1} of {sum(first.passages) - 1} available negatives are used; "
            "set it to gather to use those of all ranks"
        )
    if config.loss.objective in ("gte", "qwen3_embedding"):
        lines.append(
            f"loss.objective {config.loss.objective} adds scores in other directions to each softmax: `candidates` in "
            "metrics.jsonl counts them too"
        )
    if parts > 1:
        lines.append(
            f"train.accumulation_steps {parts} adds no negatives: each query still sees {seen} candidates; for "
            "more, set it to 1 (memory stays flat: the step is cut into micro-batches, train.micro_batch_tokens)"
        )
    tail = examples % config.train.global_batch_size
    if tail and examples > tail:
        lines.append(f"the last step of an epoch has {tail} queries, and so fewer candidates")
    if config.loss.mask_duplicates and first.duplicates:
        lines.append(
            f"masked: {first.duplicates:.1%} of the first batch's queries have their positive in it twice or more"
        )
    return lines


def warnings(config: Config, first: FirstBatch, *, l2_normalize: bool, gpus: int) -> list[str]:
    """Settings that train, but probably not as meant; each with what to do."""
    lines = []
    if not config.loss.mask_duplicates and first.duplicates:
        lines.append(
            f"{first.duplicates:.1%} of the queries have a duplicate of their positive in the batch, which counts as a "
            "negative: set loss.mask_duplicates to true"
        )
    if not l2_normalize and config.loss.temperature <= 0.05:
        lines.append(
            f"embeddings are not normalised and loss.temperature is {config.loss.temperature}: scores will be huge; "
            "set model.l2_normalize to true, or a temperature near 1"
        )
    if gpus > 1 and len(first.queries) == 1:
        lines.append(
            f"{gpus} GPUs are here but one process uses one: add --nproc-per-node {gpus}, or start with torchrun"
        )
    budget = config.train.micro_batch_tokens
    if isinstance(budget, int) and budget >= first.tokens:
        lines.append(
            f"train.micro_batch_tokens {budget} holds the whole batch ({first.tokens} tokens): cutting has no effect; "
            "lower it to save memory, or leave it at auto"
        )
    return lines


def _each(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _passages(passages: int, queries: int) -> str:
    if passages == queries:
        return "1 passage"
    return (
        f"{passages // queries} passages"
        if passages % queries == 0
        else f"{passages / queries:.2f} passages on average"
    )
