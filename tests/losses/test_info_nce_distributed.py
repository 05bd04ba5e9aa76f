"""info_nce in real process groups against the float64 formula over the whole global batch, written here from scratch.

`check_cases` is the body for any device: INBATCH_TEST_BACKEND=nccl runs it on GPUs and covers impl="fused" too; with
TRITON_INTERPRET=1 it covers impl="fused" on the CPU.
"""

import contextlib
import copy
import itertools
import math
import os
import random
import re
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from inbatch.losses import (
    CLIP,
    GTE,
    QWEN3_EMBEDDING,
    FalseNegatives,
    InfoNCELoss,
    LossStats,
    Objective,
    gathered,
    info_nce,
    tiled,
)
from inbatch.losses.masking import CANDIDATES
from tests.helpers import by_one_rank, device

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what CUDA needs to be deterministic

OBJECTIVES = [
    Objective(),
    CLIP,
    GTE,
    QWEN3_EMBEDDING,
    Objective(matryoshka_dims=(2, 5)),
    Objective(directions=("query_to_query", "passage_to_query"), partition="per_direction"),
    Objective(directions=GTE.directions, matryoshka_dims=(6, 3), matryoshka_weights=(0.5, 2.0)),
    Objective(directions=("passage_to_query",), matryoshka_dims=(4,)),
]


@dataclass
class Case:
    """A global batch in rank order, and how it is cut."""

    query_counts: list
    passage_counts: list
    queries: Tensor
    passages: Tensor
    positives: list  # global column of each row
    default_positives: bool
    temperature: float
    learnable: bool
    passage_ids: list | None
    query_ids: list | None
    positive_ids: list | None  # by row, ragged
    margin: float | None
    objective: Objective
    chunk_mib: float
    weights: list | None
    candidates: str | list  # by row
    mask_own: bool | list  # by row

    def owner(self, counts: list) -> list:
        return [rank for rank, count in enumerate(counts) for _ in range(count)]


def make_case(seed: int, world_size: int) -> Case:
    rng = random.Random(f"{seed} {world_size}")
    default_positives = rng.random() < 0.3
    group = rng.randint(1, 3)
    query_counts = [rng.choice([0, 1, 2, 3, 5]) for _ in range(world_size)]
    if sum(query_counts) == 0:
        query_counts[rng.randrange(world_size)] = 2
    extra = [rng.choice([0, 0, 1, 4]) for _ in range(world_size)]
    passage_counts = [
        b * group if default_positives and b else max(b + e, 1) if b else e
        for b, e in zip(query_counts, extra, strict=True)
    ]
    positives, before = [], 0
    for b, m in zip(query_counts, passage_counts, strict=True):
        shared = rng.random() < 0.4
        local = [i * group for i in range(b)] if default_positives else rng.sample(range(m), b)
        if shared and not default_positives:
            local = [rng.randrange(m) for _ in range(b)]
        positives += [before + column for column in local]
        before += m
    rows, columns, dim = len(positives), before, 6
    generator = torch.Generator().manual_seed(seed)
    scale = rng.choice([0.3, 1.0, 3.0])
    ids = rng.choice([3, 10, 1000])
    wide = [-(2**63), 2**62 + 1, 2**33]  # distinct in their lower 32 bits or not: no id may be cut short

    def some_ids(n: int) -> list:
        return [rng.choice([-1, rng.randrange(ids), rng.randrange(ids), rng.choice(wide)]) for _ in range(n)]

    passage_ids = some_ids(columns) if rng.random() < 0.6 else None
    objective = rng.choice([OBJECTIVES[0], *OBJECTIVES])
    mode = rng.choice([None, "in_batch_negatives", "hard_negatives", "all_negatives"])
    if mode is not None and "query_to_passage" in objective.directions:
        objective = replace(objective, hardness_mode=mode, hardness_strength=rng.choice([0.5, 5.0]))
    return Case(
        query_counts=query_counts,
        passage_counts=passage_counts,
        queries=torch.randn(rows, dim, dtype=torch.float64, generator=generator) * scale,
        passages=torch.randn(columns, dim, dtype=torch.float64, generator=generator),
        positives=positives,
        default_positives=default_positives,
        temperature=rng.choice([0.02, 0.05, 0.5, 1.0]),
        learnable=rng.random() < 0.5,
        passage_ids=passage_ids,
        query_ids=some_ids(rows) if rng.random() < 0.6 else None,
        positive_ids=[some_ids(rng.randint(0, 3)) for _ in range(rows)] if passage_ids and rng.random() < 0.5 else None,
        margin=rng.choice([None, None, 0.1, -0.3]),
        objective=objective,
        chunk_mib=rng.choice([1e-4, 1e-3, 1.0]),
        weights=[rng.choice([0.0, 0.5, 1.0, 3.0]) for _ in range(rows)] if rng.random() < 0.4 else None,
        candidates=rng.choice(["all", "own", "positives", [rng.choice(CANDIDATES) for _ in range(rows)]]),
        mask_own=rng.choice([True, False, [rng.random() < 0.5 for _ in range(rows)]]),
    )


# ---- the formula


def true_loss(case: Case, queries: Tensor, passages: Tensor, temperature: Tensor, local: bool) -> Tensor:
    """Mean over the rows of all ranks, row by row and column by column."""
    rows, columns = range(len(queries)), range(len(passages))
    row_rank, column_rank = case.owner(case.query_counts), case.owner(case.passage_counts)
    y = case.positives

    def document(j: int) -> set:
        return {case.passage_ids[j]} - {-1} if case.passage_ids else set()

    def same_query(i: int, k: int) -> bool:
        return case.query_ids is not None and case.query_ids[i] == case.query_ids[k] != -1

    @cache
    def documents(i: int) -> set:
        known = set(case.positive_ids[i]) - {-1} if case.positive_ids else set()
        again = [k for k in rows if same_query(i, k) and (not local or row_rank[k] == row_rank[i])]
        return set().union(document(y[i]), known, *(document(y[k]) for k in again))

    def is_false(direction: str, i: int, j: int) -> bool:
        if direction in ("query_to_passage", "passage_to_passage"):
            reach = [k for k in rows if y[k] == j and (not local or row_rank[k] == row_rank[i])]
            return bool(documents(i) & document(j)) or any(same_query(i, k) for k in reach)
        row_documents = document(y[i]) if direction == "passage_to_query" else documents(i)
        return bool(row_documents & documents(j)) or same_query(i, j)

    @cache
    def group_of(j: int) -> int | None:
        """The positive of the group of passage j: the nearest at or before it among those of its rank."""
        return max((k for k in y if k <= j and column_rank[k] == column_rank[j]), default=None)

    def by_row(values, i: int):
        return values[i] if isinstance(values, list) else values

    objective, total = case.objective, torch.zeros((), dtype=torch.float64)
    full = queries.shape[1]
    dims = objective.matryoshka_dims or (full,)
    for dim, dim_weight in zip(dims, objective.matryoshka_weights or [1.0] * len(dims), strict=True):
        q = queries if dim == full else F.normalize(queries[:, :dim], dim=1)
        p = passages if dim == full else F.normalize(passages[:, :dim], dim=1)
        joint = objective.partition == "joint"
        for directions in [objective.directions] if joint else [(each,) for each in objective.directions]:
            weight = dim_weight if joint else dim_weight / len(objective.directions)
            for i in rows:
                positive = q[i] @ p[y[i]]
                scores = [positive]
                for direction in directions:
                    row = q[i] if direction.startswith("query") else p[y[i]]
                    to_passages = direction.endswith("passage")
                    own = y[i] if to_passages else i
                    for j in columns if to_passages else rows:
                        if j == own or (local and (column_rank if to_passages else row_rank)[j] != row_rank[i]):
                            continue
                        score = row @ (p[j] if to_passages else q[j])
                        same_group = (group_of(j) if to_passages else y[j]) == y[i]
                        hard = to_passages and j not in y
                        policy = by_row(case.candidates, i)
                        if not same_group and (policy == "own" or (policy == "positives" and hard)):
                            continue
                        exempt = same_group and hard and not by_row(case.mask_own, i)
                        above = case.margin is not None and score > positive + case.margin
                        if not exempt and (above or is_false(direction, i, j)):
                            continue
                        weighted = {"hard_negatives": same_group, "in_batch_negatives": not same_group}
                        bonus = 0.0
                        if direction == "query_to_passage" and weighted.get(
                            objective.hardness_mode, objective.hardness_mode is not None
                        ):
                            bonus = objective.hardness_strength * score.detach()
                        scores.append(score / temperature + bonus)
                scores = torch.stack([scores[0] / temperature, *scores[1:]])
                above = scores[1:] - scores[0]
                far = bool((above > 0).any())  # else log1p keeps the digits of a tiny loss
                weight_i = weight if case.weights is None else weight * case.weights[i]
                total = total + weight_i * (
                    torch.logsumexp(scores, 0) - scores[0] if far else torch.log1p(above.exp().sum())
                )
    return total / len(queries)


def truth(case: Case, dtype: torch.dtype, local: bool) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients to queries, passages, temperature, at the values that `dtype` can hold."""
    leaves = [
        case.queries.to(dtype).double(),
        case.passages.to(dtype).double(),
        torch.tensor(case.temperature, dtype=torch.float64),
    ]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    loss = true_loss(case, *leaves, local)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return loss.detach(), [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)]


# ---- a rank's share


def run_share(case: Case, rank: int, *, dtype: torch.dtype, group=None, stats=None, **options):
    """This rank's (loss, dq, dp, dtemperature)."""
    q0, p0 = sum(case.query_counts[:rank]), sum(case.passage_counts[:rank])
    my_rows, my_columns = slice(q0, q0 + case.query_counts[rank]), slice(p0, p0 + case.passage_counts[rank])
    queries = case.queries[my_rows].to(device(), dtype).requires_grad_()
    passages = case.passages[my_columns].to(device(), dtype).requires_grad_()
    temperature = torch.tensor(case.temperature, dtype=torch.float64, device=device()).requires_grad_()

    def ids(values: list | None, where: slice) -> Tensor | None:
        return None if values is None else torch.tensor(values[where], dtype=torch.int64, device=device())

    def places(names: list) -> Tensor:
        return torch.tensor([CANDIDATES.index(name) for name in names], dtype=torch.int64)

    def by_row(values: bool | list, where: slice) -> bool | Tensor:
        return values if isinstance(values, bool) else torch.tensor(values[where], dtype=torch.bool)

    positive_ids = None
    if case.positive_ids is not None:
        mine = case.positive_ids[my_rows]
        width = max([len(each) for each in mine], default=0)
        positive_ids = torch.tensor([each + [-1] * (width - len(each)) for each in mine], dtype=torch.int64)
        positive_ids = positive_ids.view(len(mine), width)
    positives = torch.tensor([y - p0 for y in case.positives[my_rows]], dtype=torch.int64, device=device())
    loss = info_nce(
        queries,
        passages,
        positives=None if case.default_positives else positives,
        temperature=temperature if case.learnable else case.temperature,
        false_negatives=FalseNegatives(
            passage_ids=ids(case.passage_ids, my_columns),
            query_ids=ids(case.query_ids, my_rows),
            positive_ids=positive_ids,
            margin=case.margin,
            candidates=case.candidates if isinstance(case.candidates, str) else places(case.candidates[my_rows]),
            mask_own_negatives=by_row(case.mask_own, my_rows),
        ),
        weights=None if case.weights is None else torch.tensor(case.weights[my_rows], dtype=torch.float64),
        objective=case.objective,
        chunk_mib=case.chunk_mib,
        group=group,
        stats=stats,
        **options,
    )
    (loss * 3).backward()  # any scale must reach the gradients
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    gradients = [queries.grad / 3, passages.grad / 3, temperature.grad / 3 if case.learnable else None]
    return loss.detach().double().cpu(), [None if g is None else g.double().cpu() for g in gradients]


def check_share(case: Case, rank: int, group, share, expected, tolerance: float, what: str) -> None:
    """Averaged over ranks, losses and gradients are those of one process."""
    size = len(case.query_counts)
    loss, (dq, dp, dt) = share
    true, (true_dq, true_dp, true_dt) = expected
    dt_or_zero = torch.zeros((), dtype=torch.float64) if dt is None else dt
    both = [None] * size
    dist.all_gather_object(both, (loss, dt_or_zero), group=group)
    mine = true_dq.split(case.query_counts)[rank], true_dp.split(case.passage_counts)[rank]
    pairs = [
        ("loss", torch.stack([each[0] for each in both]).mean(), true, true.abs()),
        ("dq", dq / size, mine[0], true_dq.abs().max()),
        ("dp", dp / size, mine[1], true_dp.abs().max()),
    ]
    if dt is not None:
        pairs.append(("dtemperature", torch.stack([each[1] for each in both]).mean(), true_dt, true_dt.abs()))
    for name, ours, theirs, magnitude in pairs:
        error = (ours - theirs).abs().max() if ours.numel() else torch.zeros(())
        assert error <= tolerance * (magnitude + 1e-3), f"{what}: {name} off by {error:.3g} of {magnitude:.3g}"


def check_cases(rank: int, world_size: int, seeds: range) -> int:
    """The body: every implementation and way of negatives, for many random global batches."""
    torch.use_deterministic_algorithms(True)  # fills fresh buffers with NaN
    smallest = gathered.SMALLEST_PIECE_BYTES
    variants = [("reference", torch.float64, 1e-7), ("tiled", torch.float64, 1e-7), ("tiled", torch.bfloat16, 2e-2)]
    if device().type == "cuda":
        variants += [("fused", torch.float32, 1e-3), ("fused", torch.bfloat16, 2e-2), ("fused", torch.float16, 2e-2)]
    elif os.environ.get("TRITON_INTERPRET") == "1":
        variants += [("fused", torch.float32, 1e-3)]
    checked = 0
    try:
        for seed in seeds:
            case = make_case(seed, world_size)
            gathered.SMALLEST_PIECE_BYTES = smallest if seed % 2 else 16  # gathered whole, or in pieces
            for local in (False, True):
                dtypes = {variant[1] for variant in variants}
                by_dtype = by_one_rank(lambda: {dtype: truth(case, dtype, local) for dtype in dtypes})  # noqa: B023
                for impl, dtype, tolerance in variants:
                    for negatives in ("local",) if local else ("gather", "ring"):
                        if dtype != torch.float64 and case.objective.matryoshka_dims:
                            continue  # renormalised prefixes are rounded once more, in any code
                        share = run_share(case, rank, dtype=dtype, impl=impl, negatives=negatives)
                        what = f"seed {seed}, {impl}, {negatives}, {dtype}"
                        check_share(case, rank, None, share, by_dtype[dtype], tolerance, what)
                        checked += 1
    finally:
        torch.use_deterministic_algorithms(False)
        gathered.SMALLEST_PIECE_BYTES = smallest
    return checked


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_path_gives_the_one_process_loss_and_gradients(pool, world_size):
    seeds = range(24 - 3 * world_size)
    counts = pool.run(check_cases, world_size, world_size, seeds, timeout_s=200)
    assert min(counts) >= 6 * len(seeds)


# ---- options in pairs

IDS = {"passage_ids": [1, 2, 3, 1, 5, 6, 7, 7, 2, 9], "query_ids": [1, 2, 1, 3]}
FEATURES = {
    "ids": IDS,
    "margin": {"margin": 0.1},
    "clip": {"objective": CLIP},
    "gte": {"objective": GTE},
    "matryoshka": {"objective": Objective(matryoshka_dims=(6, 3))},
    "weights": {"weights": [0.5, 2.0, 0.0, 1.0]},
    "own": {"candidates": "own"},
    "positives": {"candidates": "positives"},
    "by row": {"candidates": ["all", "own", "positives", "own"]},
    "kept": IDS | {"mask_own": False},
    "in batch": {"objective": Objective(hardness_mode="in_batch_negatives", hardness_strength=9.0)},
    "hard": {"objective": Objective(hardness_mode="hard_negatives", hardness_strength=5.0)},
    "all": {"objective": Objective(hardness_mode="all_negatives", hardness_strength=2.0)},
    "learnable": {"learnable": True},
}


def together(one: dict, other: dict) -> dict:
    """Both features' changes; of two objectives, the directions of one and the hardness of the other."""
    both = one | other
    if "objective" in one and "objective" in other:
        hard = one["objective"] if one["objective"].hardness_mode else other["objective"]
        plain = other["objective"] if hard is one["objective"] else one["objective"]
        both["objective"] = replace(plain, hardness_mode=hard.hardness_mode, hardness_strength=hard.hardness_strength)
    return both


def check_pairs(rank: int) -> int:
    """Every two options together, on two ranks with 3 and 1 queries and groups of different sizes."""
    plain = Case(
        query_counts=[3, 1],
        passage_counts=[6, 4],
        queries=torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
        passages=torch.randn(10, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)),
        positives=[0, 1, 4, 6],
        default_positives=False,
        temperature=0.5,
        learnable=False,
        passage_ids=None,
        query_ids=None,
        positive_ids=None,
        margin=None,
        objective=Objective(),
        chunk_mib=1e-4,
        weights=None,
        candidates="all",
        mask_own=True,
    )
    checked = 0
    for (name, one), (other_name, other) in itertools.combinations(FEATURES.items(), 2):
        case = replace(plain, **together(one, other))
        expected = by_one_rank(partial(truth, case, torch.float64, local=False))
        for impl in ("reference", "tiled"):
            for negatives in ("gather", "ring"):
                share = run_share(case, rank, dtype=torch.float64, impl=impl, negatives=negatives)
                what = f"{name} with {other_name}, {impl}, {negatives}"
                check_share(case, rank, None, share, expected, 1e-7, what)
                checked += 1
    return checked


def test_options_compose_in_pairs(pool):
    assert pool.run(check_pairs, 2, timeout_s=200) == [4 * math.comb(len(FEATURES), 2)] * 2


# ---- groups that are not the whole world


def mesh_body(rank: int, seed: int) -> None:
    """A 2 x 2 mesh whose second dimension holds copies, as tensor parallelism does: only the first is to be counted."""
    mesh = dist.init_device_mesh(device().type, (2, 2), mesh_dim_names=("data", "copies"))
    group, position = mesh.get_group("data"), mesh.get_local_rank("data")
    case = make_case(seed, 2)
    for negatives in ("gather", "ring", "local"):
        expected = truth(case, torch.float64, negatives == "local")
        for impl in ("reference", "tiled"):
            stats = LossStats()
            share = run_share(
                case, position, dtype=torch.float64, group=group, stats=stats, impl=impl, negatives=negatives
            )
            check_share(case, position, group, share, expected, 1e-7, f"{impl}, {negatives}")
            if case.objective.directions == ("query_to_passage",) and negatives != "local":
                figures = stats.result()
                total = sum(case.passage_counts)
                assert figures["candidates"] == pytest.approx(total - figures["masked"] * (total - 1))


def test_a_subgroup_counts_nothing_twice(pool):
    for seed in (0, 1, 2):
        pool.run(mesh_body, 4, seed)


# ---- memory


def ring_body(rank: int) -> int:
    """The most columns that this rank ever scored at once."""
    widths, original = [], tiled.exp_scores

    def recording(block, *args, **kwargs):
        widths.append(block.columns.shape[0])
        return original(block, *args, **kwargs)

    tiled.exp_scores = recording
    try:
        queries, passages = torch.randn(2, 4, requires_grad=True), torch.randn(2 + 2 * rank, 4, requires_grad=True)
        info_nce(queries.to(device()), passages.to(device()), negatives="ring", impl="tiled").backward()
    finally:
        tiled.exp_scores = original
    return max(widths)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ring_never_scores_more_than_one_ranks_columns(pool, world_size):
    assert pool.run(ring_body, world_size) == [2 + 2 * (world_size - 1)] * world_size


# ---- mistakes


def _inputs(rows: int = 2, columns: int = 4, dim: int = 3, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    make = {"device": device(), "dtype": dtype, "requires_grad": True}
    return torch.randn(rows, dim, **make), torch.randn(columns, dim, **make)


MISTAKES = {
    # name: (what rank 1 changes, what every rank must be told)
    "dimension": (
        lambda a: a.update(inputs=_inputs(dim=5)),
        r"queries: ranks 0, 2 have \(rows, 3\).*, rank 1 has \(rows, 5\)",
    ),
    "dtype": (lambda a: a.update(inputs=_inputs(dtype=torch.float64)), r"rank 1.*float64"),
    "uneven groups": (lambda a: a.update(inputs=_inputs(columns=5)), r"rank 1.*5 passages cannot be split"),
    "positives out of range": (
        lambda a: a.update(positives=torch.tensor([0, 4], device=device())),
        r"rank 1.*positives must be columns of the 4 local passages, from 0 to 3, got values from 0 to 4",
    ),
    "positives float": (
        lambda a: a.update(positives=torch.zeros(2)),
        r"rank 1.*positives must be an int64 tensor \[2\]",
    ),
    "temperature": (lambda a: a.update(temperature=0.0), r"rank 1.*temperature must be positive and finite"),
    "other temperature": (lambda a: a.update(temperature=0.5), r"temperature.*rank 1 has 0.5"),
    "temperature a tensor": (
        lambda a: a.update(temperature=torch.tensor(0.5)),
        r"temperature: ranks 0, 2 have 0.1, rank 1 has 'a tensor of 0.5'",
    ),
    "temperature not a scalar": (
        lambda a: a.update(temperature=torch.tensor([0.1, 0.2])),
        r"rank 1: temperature must be a float or a 0-d floating-point tensor, got \(2,\) float32",
    ),
    "temperature empty": (lambda a: a.update(temperature=torch.ones(0)), r"rank 1: temperature must .* got \(0,\)"),
    "temperature on meta": (
        lambda a: a.update(temperature=torch.tensor(0.1, device="meta")),
        "rank 1: temperature is on the meta device",
    ),
    "float8": (
        lambda a: a.update(inputs=tuple(each.detach().to(torch.float8_e4m3fn) for each in _inputs())),
        r"rank 1: queries must be .* of float16, .* got \(2, 3\) float8_e4m3fn",
    ),
    "stats on one rank": (lambda a: a.update(stats=LossStats()), r"stats: ranks 0, 2 have False, rank 1 has True"),
    "other margin": (lambda a: a.update(false_negatives=FalseNegatives(margin=0.1)), r"margin.*rank 1 has 0.1"),
    "ids on one rank": (
        lambda a: a.update(false_negatives=FalseNegatives(torch.arange(4, device=device()))),
        r"passage_ids: ranks 0, 2 have None, rank 1 has \(rows\) int64",
    ),
    "short ids": (lambda a: a.update(false_negatives=FalseNegatives(torch.arange(3))), r"rank 1.*passage_ids must be"),
    "frozen on one rank": (
        lambda a: a.update(inputs=tuple(each.detach() for each in _inputs())),
        r"queries.*rank 1 has \(rows, 3\) float32",
    ),
    "other negatives": (lambda a: a.update(negatives="local"), r"negatives.*rank 1 has 'local'"),
    "other impl": (lambda a: a.update(impl="reference"), r"impl.*rank 1 has 'reference'"),
    "other candidates": (
        lambda a: a.update(false_negatives=FalseNegatives(candidates="own")),
        r"candidates: ranks 0, 2 have 'all', rank 1 has 'own'",
    ),
    "unknown candidates": (
        lambda a: a.update(false_negatives=FalseNegatives(candidates="none")),
        r'rank 1: FalseNegatives.candidates must be "all", "positives" or "own".* got str',
    ),
    "candidates an array": (
        lambda a: a.update(false_negatives=FalseNegatives(candidates=np.zeros(2))),  # type: ignore[arg-type]
        "rank 1: FalseNegatives.candidates must be .* got ndarray",
    ),
    "weights on one rank": (
        lambda a: a.update(weights=torch.ones(2)),
        r"weights: ranks 0, 2 have False, rank 1 has True",
    ),
    "negative weights": (lambda a: a.update(weights=torch.tensor([1.0, -1.0])), r"rank 1: weights must be .*negative"),
    "other objective": (lambda a: a.update(objective=CLIP), r"objective.*rank 1"),
}


def mistake_body(rank: int) -> dict:
    """Every mistake on rank 1 of 3 in turn: the message on this rank. The group stays usable in between."""
    messages = {}
    for name, (change, _) in MISTAKES.items():
        arguments = {"inputs": _inputs(), "temperature": 0.1, "impl": "tiled"}
        if rank == 1:
            change(arguments)
        try:
            info_nce(*arguments.pop("inputs"), **arguments)
            messages[name] = None
        except ValueError as error:
            messages[name] = str(error)
    try:
        info_nce(*_inputs(rows=0, columns=2))
        messages["no queries anywhere"] = None
    except ValueError as error:
        messages["no queries anywhere"] = str(error)
    return messages


def test_a_mistake_on_one_rank_is_told_on_every_rank(pool):
    answers = pool.run(mistake_body, 3, timeout_s=30)
    expected = {name: pattern for name, (_, pattern) in MISTAKES.items()}
    for name, pattern in (expected | {"no queries anywhere": "no queries on any rank"}).items():
        for rank, messages in enumerate(answers):
            assert messages[name] is not None, f"{name}: rank {rank} was told nothing"
            assert re.search(pattern, messages[name]), f"{name}: rank {rank} was told {messages[name]!r}"


# ---- copies


def copy_body(rank: int) -> bool:
    """Whether a copy of the loss, and of what it counted, goes on in the same group as the original."""
    group, (queries, passages), stats = dist.new_group([0, 1]), _inputs(), LossStats()
    loss = torch.nn.Sequential(InfoNCELoss(0.2, learnable=True, group=group)).to(device())
    twin = copy.deepcopy(loss)
    value = loss[0](queries, passages, stats=stats)
    counted = copy.deepcopy(stats)
    stats.reset()
    return (
        twin[0].group is group
        and twin[0].log_temperature is not loss[0].log_temperature
        and torch.equal(twin[0](queries, passages), value)
        and counted.result()["candidates"] == 8
    )


def test_a_copy_shares_the_process_group(pool):
    assert pool.run(copy_body, 2) == [True, True]


# ---- a learnable temperature under data parallelism


def learnable_body(rank: int, size: int) -> float:
    """The gradient of InfoNCELoss's parameter, averaged over ranks as DDP would."""
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(6, 4, dtype=torch.float64, generator=generator)[rank * (6 // size) :][: 6 // size]
    passages = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    passages = passages[rank * (12 // size) :][: 12 // size]
    loss = InfoNCELoss(0.2, learnable=True).to(device())
    loss(queries.to(device()), passages.to(device())).backward()
    gradient = loss.log_temperature.grad
    dist.all_reduce(gradient)
    return gradient.item() / size


def test_learnable_temperature_does_not_depend_on_the_number_of_ranks(pool):
    one, three = pool.run(learnable_body, 1, 1), pool.run(learnable_body, 3, 3)
    assert one[0] != 0
    assert three == pytest.approx(one * 3, rel=1e-6)


def second_derivative_body(rank: int, rows: list[int]) -> None:
    """The gradient of a penalty on the gradient, which the reference has."""
    generator = torch.Generator().manual_seed(3)
    whole = [torch.randn(sum(rows), 4, dtype=torch.float64, generator=generator).to(device()) for _ in range(2)]
    queries, passages = (column.requires_grad_() for column in whole)
    mine = [column.detach().split(rows)[rank].requires_grad_() for column in whole]
    labels = torch.arange(len(queries), device=device())
    loss = torch.nn.functional.cross_entropy(queries @ passages.T / 0.5, labels)
    expected = torch.autograd.grad(_penalty(loss, [queries, passages], 1), (queries, passages))
    share = info_nce(*mine, temperature=0.5, impl="reference")
    found = torch.autograd.grad(_penalty(share, mine, len(rows)), mine)
    for ours, whole_gradient in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, whole_gradient.split(rows)[rank])


def _penalty(loss: Tensor, inputs: list[Tensor], size: int) -> Tensor:
    return sum((g / size).square().sum() for g in torch.autograd.grad(loss, inputs, create_graph=True))


@pytest.mark.parametrize("rows", [[3, 2], [3, 0, 2]], ids=str)
def test_second_derivatives_over_ranks(pool, rows):
    pool.run(second_derivative_body, len(rows), rows)


def one_rank_reset_body(rank: int) -> tuple[str, float]:
    stats = LossStats()
    info_nce(*_inputs(), stats=stats)
    if rank == 1:
        stats.reset()
    with pytest.raises(ValueError, match="nothing yet") as caught:
        stats.result()
    stats.reset()
    info_nce(*_inputs(), stats=stats)
    return str(caught.value), stats.result()["candidates"]


def test_statistics_that_one_rank_forgot_are_told_on_every_rank(pool):
    for message, candidates in pool.run(one_rank_reset_body, 2, timeout_s=30):
        assert message.startswith("rank 1: LossStats has collected nothing yet")
        assert candidates == 8


class Held(torch.nn.Module):
    """A loss and an encoder in one module, as DDP gets them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.loss = torch.nn.Linear(4, 4, dtype=torch.float64), InfoNCELoss(0.2, learnable=True)

    def forward(self, queries, passages):
        return self.loss(self.encoder(queries), self.encoder(passages))


def temperature_body(rank: int, rows: list[int]) -> None:
    """The parameter's gradient as it is after backward, nobody else averaging, and under DDP, which averages too."""
    generator = torch.Generator().manual_seed(3)
    whole = [torch.randn(sum(rows), 4, dtype=torch.float64, generator=generator).to(device()) for _ in range(2)]
    mine = [column.split(rows)[rank] for column in whole]
    alone = Held().to(device())
    scores = alone.encoder(whole[0]) @ alone.encoder(whole[1]).T / alone.loss.temperature
    torch.nn.functional.cross_entropy(scores, torch.arange(len(scores), device=device())).backward()
    expected = alone.loss.log_temperature.grad
    outside, inside = Held().to(device()), Held().to(device())
    encoder = torch.nn.parallel.DistributedDataParallel(outside.encoder)
    ddp = torch.nn.parallel.DistributedDataParallel(inside)
    ways = {
        "outside": (outside, lambda: outside.loss(encoder(mine[0]), encoder(mine[1])), contextlib.nullcontext),
        "inside": (inside, lambda: ddp(*mine), ddp.no_sync),
    }
    for name, (held, loss, no_sync) in ways.items():
        loss().backward()
        torch.testing.assert_close(held.loss.log_temperature.grad, expected, msg=name)
        held.zero_grad()
        with no_sync():
            (loss() / 2).backward()
        (loss() / 2).backward()
        torch.testing.assert_close(held.loss.log_temperature.grad, expected, msg=name)
    twin = copy.deepcopy(outside)
    twin.zero_grad()
    twin(*mine).backward()
    torch.testing.assert_close(twin.loss.log_temperature.grad, expected)


@pytest.mark.parametrize("rows", [[4, 4], [3, 5], [5, 1, 2], [4, 0, 3]], ids=str)
def test_a_learnable_temperature_is_averaged_where_it_is(pool, rows):
    pool.run(temperature_body, len(rows), rows)
