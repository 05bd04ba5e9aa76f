"""info_nce over several vectors a text, in real process groups, against a loop over tokens in float64."""

import math
import random
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from inbatch.losses import CLIP, FalseNegatives, InfoNCELoss, LossStats, Objective, info_nce
from inbatch.losses.max_sim import max_sim, packed, read_spans
from tests.helpers import by_one_rank

DIM = 6


@dataclass
class Case:
    """A global batch in rank order: a list of tokens [t, D] for each text, and how the texts are cut over the ranks."""

    query_counts: list
    passage_counts: list
    queries: list
    passages: list
    positives: list  # global column of each row
    passage_ids: list | None
    margin: float | None
    candidates: str
    mean: bool
    objective: Objective
    negatives: str
    weights: list | None
    temperature: float


def make_case(seed: int, world_size: int) -> Case:
    rng = random.Random(f"{seed} {world_size}")
    query_counts = [rng.choice([0, 1, 2, 4]) for _ in range(world_size)]
    query_counts[rng.randrange(world_size)] = 3
    passage_counts = [0 if n == 0 and rng.random() < 0.5 else rng.randint(1, 6) for n in query_counts]
    passage_counts = [max(m, int(n > 0)) for m, n in zip(passage_counts, query_counts, strict=True)]
    positives, before = [], 0
    for n, m in zip(query_counts, passage_counts, strict=True):
        positives += [before + rng.randrange(m) for _ in range(n)]
        before += m
    generator = torch.Generator().manual_seed(rng.randrange(2**31))

    def texts(count: int, longest: int) -> list:
        # Few values whose products are exact, so that maxima tie (prefixes are normalised, and rounding would decide
        # there); at times all of one sign, so that a masked token would win.
        sign = rng.choice([0.0, 2.0])
        shapes = [(rng.randint(1, longest), DIM) for _ in range(count)]
        if objective.matryoshka_dims:
            return [torch.randn(shape, generator=generator, dtype=torch.float64) - sign for shape in shapes]
        return [torch.randint(-2, 3, shape, generator=generator).double() / 4 - sign for shape in shapes]

    negatives = rng.choice(["gather", "ring", "local"])
    objectives = [Objective(), Objective(matryoshka_dims=(DIM, 3), matryoshka_weights=(1.0, 0.5))]
    if negatives != "ring":
        objectives += [CLIP, Objective(directions=("query_to_passage", "passage_to_query"))]
    objective = rng.choice(objectives)
    rows, columns = sum(query_counts), sum(passage_counts)
    return Case(
        query_counts=query_counts,
        passage_counts=passage_counts,
        queries=texts(rows, 4),
        passages=texts(columns, 7),
        positives=positives,
        passage_ids=[rng.randrange(columns) for _ in range(columns)] if rng.random() < 0.6 else None,
        margin=rng.choice([None, None, 0.4571]),
        candidates=rng.choice(["all", "positives", "own"]),
        mean=rng.random() < 0.5,
        objective=objective,
        negatives=negatives,
        weights=[rng.random() for _ in range(rows)] if rng.random() < 0.3 else None,
        temperature=rng.choice([0.3, 1.0]),
    )


def similarity(query: Tensor, passage: Tensor, mean: bool) -> Tensor:
    best = [torch.stack([x @ y for y in passage]) for x in query]
    total = sum(products[int(products.argmax())] for products in best)  # argmax: the first of equal ones
    return total / len(query) if mean else total


def oracle(case: Case, queries: list, passages: list, temperature: Tensor) -> Tensor:
    def owner(counts):
        return [rank for rank, count in enumerate(counts) for _ in range(count)]

    row_owner, column_owner = owner(case.query_counts), owner(case.passage_counts)
    # A passage is of the group of the last positive at or before it on its rank.
    ends = [max((p for p in case.positives if p <= j and column_owner[p] == column_owner[j]), default=-1)
            for j in range(len(passages))]  # fmt: skip
    directions = case.objective.directions
    parts = [directions] if case.objective.partition == "joint" else [(direction,) for direction in directions]
    total = torch.zeros((), dtype=torch.float64)
    dims = case.objective.matryoshka_dims or (DIM,)
    for dim, weight in zip(dims, case.objective.matryoshka_weights or [1.0] * len(dims), strict=True):
        q, p = ([text if dim == DIM else torch.nn.functional.normalize(text[:, :dim], dim=1) for text in texts]
                for texts in (queries, passages))  # fmt: skip
        for part in parts:
            for i, positive in enumerate(case.positives):
                own = similarity(q[i], p[positive], case.mean)
                scores = [own / temperature]
                for direction in part:
                    for j in range(len(p) if direction == "query_to_passage" else len(q)):
                        elsewhere = (column_owner if direction == "query_to_passage" else row_owner)[j]
                        if case.negatives == "local" and elsewhere != row_owner[i]:
                            continue
                        column = j if direction == "query_to_passage" else case.positives[j]
                        if j == (positive if direction == "query_to_passage" else i):
                            continue
                        pair = (q[i], p[j]) if direction == "query_to_passage" else (q[j], p[positive])
                        score, ids = similarity(*pair, case.mean), case.passage_ids
                        if ids is not None and ids[column] == ids[positive]:
                            continue
                        if case.margin is not None and score.detach() > own.detach() + case.margin:
                            continue
                        other = direction == "query_to_passage" and ends[j] != positive
                        if other and (case.candidates == "own" or (case.candidates == "positives" and ends[j] != j)):
                            continue
                        if direction == "passage_to_query" and case.candidates == "own" and column != positive:
                            continue
                        scores.append(score / temperature)
                row = torch.logsumexp(torch.stack(scores), 0) - scores[0]
                total = total + row * weight / len(parts) * (1.0 if case.weights is None else case.weights[i])
    return total / len(case.positives)


def truth(case: Case) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients to every text and the temperature."""
    temperature = torch.tensor(case.temperature, dtype=torch.float64, requires_grad=True)
    texts = [[text.clone().requires_grad_() for text in side] for side in (case.queries, case.passages)]
    loss = oracle(case, *texts, temperature)
    leaves = [*texts[0], *texts[1], temperature]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return loss.detach(), [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True)]


def padded(texts: list, extra: int) -> tuple[Tensor, Tensor]:
    """Tensors [rows, T, D] and a mask; what is masked holds large values, and stands in front of real ones at times."""
    length = max((len(text) for text in texts), default=1) + extra
    vectors, mask = torch.full((len(texts), length, DIM), 50.0, dtype=torch.float64), torch.zeros(len(texts), length)
    for row, text in enumerate(texts):
        start = row % (length - len(text) + 1)
        vectors[row, start : start + len(text)] = text
        mask[row, start : start + len(text)] = 1
    return vectors.requires_grad_(), mask.long()


def _check(rank: int, world_size: int, seeds: range) -> None:
    for seed in seeds:
        case = make_case(seed, world_size)
        expected, gradients = by_one_rank(partial(truth, case))
        cuts = []
        for counts in (case.query_counts, case.passage_counts):
            start = sum(counts[:rank])
            cuts.append(slice(start, start + counts[rank]))
        rows, columns = cuts
        for impl in ("reference", "tiled"):
            queries, query_mask = padded(case.queries[rows], rank % 2)
            passages, passage_mask = padded(case.passages[columns], 1)
            learnt = torch.tensor(case.temperature, dtype=torch.float64, requires_grad=True)
            ids = case.passage_ids
            loss = info_nce(
                queries, passages,
                query_mask=query_mask, passage_mask=passage_mask.bool(),
                positives=torch.tensor([p - columns.start for p in case.positives[rows]], dtype=torch.int64),
                temperature=learnt, impl=impl, negatives=case.negatives, objective=case.objective,
                false_negatives=FalseNegatives(
                    passage_ids=None if ids is None else torch.tensor(ids[columns], dtype=torch.int64),
                    margin=case.margin, candidates=case.candidates,
                ),
                token_reduction="mean" if case.mean else "sum",
                weights=None if case.weights is None else torch.tensor(case.weights[rows], dtype=torch.float64),
                chunk_mib=random.Random(seed).choice([None, 0.0005]),
            )  # fmt: skip
            loss.backward()
            everywhere = loss.detach().clone()
            if world_size > 1:
                dist.all_reduce(everywhere)
                dist.all_reduce(learnt.grad)
            torch.testing.assert_close(everywhere / world_size, expected)
            torch.testing.assert_close(learnt.grad / world_size, gradients[-1])
            for vectors, mask, some, first in (
                (queries, query_mask, rows, 0), (passages, passage_mask, columns, len(case.queries)),
            ):  # fmt: skip
                real = vectors.grad[mask.bool()] / world_size
                wanted = gradients[first + some.start : first + some.stop]
                torch.testing.assert_close(real, torch.cat([real.new_empty(0, DIM), *wanted]), msg=str((seed, impl)))
                assert not vectors.grad[~mask.bool()].any()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_equals_a_loop_over_tokens(pool, world_size):
    pool.run(_check, world_size, world_size, range(25))


def test_one_token_is_the_dense_loss():
    generator = torch.Generator().manual_seed(1)
    queries, passages = (torch.randn(n, 16, generator=generator) for n in (5, 10))
    for impl in ("reference", "tiled"):
        late = info_nce(queries[:, None], passages[:, None], impl=impl, temperature=0.5)
        torch.testing.assert_close(late, info_nce(queries, passages, impl="reference", temperature=0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_scored_in_float32(dtype):
    generator = torch.Generator().manual_seed(2)
    queries, passages = (torch.randn(*shape, 16, generator=generator).to(dtype) for shape in ((4, 5), (8, 9)))
    wide = [x.double().requires_grad_() for x in (queries, passages)]
    narrow = [x.clone().requires_grad_() for x in (queries, passages)]
    for inputs in (wide, narrow):
        info_nce(*inputs, temperature=1.0).backward()
    for ours, exact in zip(narrow, wide, strict=True):
        assert ours.grad.dtype == dtype
        error = (ours.grad.double() - exact.grad).norm() / exact.grad.norm()
        assert error < {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 5e-6}[dtype]


def test_the_grid_is_never_held():
    """What is kept for the backward pass is 2 bytes a query token and passage, not 4 a pair of tokens."""
    queries, passages = torch.randn(8, 16, 8, requires_grad=True), torch.randn(64, 100, 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        info_nce(queries, passages, temperature=1.0)
    places = [tensor for tensor in saved if tensor.shape == (8 * 16, 64)]
    assert [tensor.dtype for tensor in places] == [torch.int16]
    assert max(tensor.numel() for tensor in saved) == passages.numel()


def test_stats_module_and_no_grad():
    queries, passages = torch.randn(3, 4, 8, requires_grad=True), torch.randn(6, 5, 8)
    stats = LossStats()
    loss = InfoNCELoss(1.0)(queries, passages, stats=stats, query_mask=torch.ones(3, 4))
    assert stats.result()["candidates"] == 6
    with torch.no_grad():
        assert not InfoNCELoss(1.0)(queries, passages).requires_grad
    torch.testing.assert_close(loss, info_nce(queries, passages, temperature=1.0))


def test_scores_alone():
    queries, passages = torch.randn(3, 4, 8), torch.randn(6, 5, 8)
    mask = torch.rand(6, 5) > 0.3
    mask[:, 0] = True
    (of_queries, of_passages), error = read_spans({"queries": (queries, None), "passages": (passages, mask)})
    assert error is None
    found = max_sim(packed(queries, of_queries), packed(passages, of_passages))
    grid = torch.einsum("itd,jsd->ijts", queries, passages).masked_fill(~mask[None, :, None], -math.inf)
    torch.testing.assert_close(found, grid.amax(3).sum(2))
    assert packed(passages, of_passages).vectors.shape == (int(mask.sum()), 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passages": torch.ones(2, 4)}, "both be one vector a text, or both several"),
        ({"query_mask": torch.ones(2, 4)}, r"query_mask must be a tensor \[2, 3\], not 0 where"),
        ({"passage_mask": torch.tensor([[1, 1], [0, 0]])}, "passage_mask: text 1 of 2 has no real token"),
        ({"token_reduction": "max"}, "token_reduction must be .* got 'max'"),
        ({"impl": "fused"}, 'impl="fused" cannot run here: it needs CUDA, the inputs are on cpu; use impl="auto"'),
        ({"objective": Objective(directions=("query_to_query",))}, "alone, got the directions query_to_query"),
        ({"objective": CLIP, "negatives": "ring"}, 'use negatives="gather" for passage_to_query'),
        ({"queries": torch.ones(2, 4), "passages": torch.ones(2, 4), "query_mask": torch.ones(2)}, "is for late inter"),
    ],
)  # fmt: skip
def test_misuse(options, message):
    given = {"queries": torch.ones(2, 3, 4), "passages": torch.ones(2, 2, 4), **options}
    with pytest.raises(ValueError, match=message):
        info_nce(given.pop("queries"), given.pop("passages"), **given)


@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize("mode", ["hard_negatives", "in_batch_negatives", "all_negatives"])
def test_hardness_adds_a_share_of_the_late_interaction(impl, mode):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(4, 3, DIM, dtype=torch.float64, generator=generator)
    passages = torch.randn(12, 5, DIM, dtype=torch.float64, generator=generator)
    similarity = torch.einsum("bxd,cyd->bcxy", queries, passages).amax(3).sum(2)
    same = torch.arange(12) // 3 == torch.arange(4)[:, None]
    positive = torch.arange(12) == 3 * torch.arange(4)[:, None]
    weighted = {"hard_negatives": same, "in_batch_negatives": ~same, "all_negatives": same | ~same}[mode] & ~positive
    scores = similarity / 0.5 + 0.3 * similarity * weighted
    expected = (torch.logsumexp(scores, 1) - scores[positive]).mean()
    objective = Objective(hardness_mode=mode, hardness_strength=0.3)
    loss = info_nce(queries, passages, temperature=0.5, impl=impl, objective=objective)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
