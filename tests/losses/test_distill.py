"""Distillation in real process groups against loops over queries, passages and tokens, in float64."""

import math
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from inbatch import GradCache, collectives
from inbatch.losses import distill, info_nce, match_vectors
from tests.helpers import by_one_rank

DIM = 4


def similarity(query: Tensor, passage: Tensor, mean: bool) -> Tensor:
    """The product of two vectors, or the sum over the query's tokens of the best product with a passage's token."""
    if query.ndim == 1:
        return query @ passage
    best = [max((x @ y for y in passage), key=lambda product: product.item()) for x in query]
    return sum(best) / (len(best) if mean else 1)


def oracle(queries, passages, candidates, temperature, teacher_temperature, weights, mean) -> Tensor:
    """candidates: of each query, {global column: the teacher's score}."""
    total = torch.zeros((), dtype=torch.float64)
    for query, scores, weight in zip(queries, candidates, weights, strict=True):
        ours = {j: torch.exp(similarity(query, passages[j], mean) / temperature) for j in scores}
        theirs = {j: math.exp(score / teacher_temperature) for j, score in scores.items()}
        for j in scores:
            a, b = theirs[j] / sum(theirs.values()), ours[j] / sum(ours.values())
            total = total + weight * a * (math.log(a) - torch.log(b))
    return total / len(queries)


def truth(queries, passages, candidates, weights, mean) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients to every text and the temperature."""
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    leaves = [text.clone().requires_grad_() for text in (*queries, *passages)]
    loss = oracle(leaves[: len(queries)], leaves[len(queries) :], candidates, temperature, 2.0, weights, mean)
    gradients = [torch.zeros_like(x) for x in (*leaves, temperature)]
    if loss.requires_grad:
        known = torch.autograd.grad(loss, [*leaves, temperature], allow_unused=True)
        gradients = [z if g is None else g for g, z in zip(known, gradients, strict=True)]
    return loss.detach(), gradients


def check(rank: int, world_size: int, seeds: range) -> None:
    for seed in seeds:
        rng = random.Random(f"{seed} {world_size}")
        generator = torch.Generator().manual_seed(seed)
        late, mean, pool = rng.random() < 0.5, rng.random() < 0.5, rng.random() < 0.5
        query_counts = [rng.choice([0, 1, 3]) for _ in range(world_size)]
        query_counts[rng.randrange(world_size)] = 2
        passage_counts = [rng.randint(n > 0, 5) for n in query_counts]
        starts = [sum(passage_counts[:r]) for r in range(world_size)]
        longest = 3 if late else None

        def texts(count, longest=longest, rng=rng, generator=generator):
            shapes = [(rng.randint(1, longest), DIM) if longest else (DIM,) for _ in range(count)]
            return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]

        queries, passages = texts(sum(query_counts)), texts(sum(passage_counts))
        positives, tables, candidates = [], [], []
        for r, (n, m) in enumerate(zip(query_counts, passage_counts, strict=True)):
            for _ in range(n):
                first = rng.randrange(m)
                width = sum(passage_counts) if pool else passage_counts[r]
                row = [rng.uniform(-3, 3) if rng.random() < 0.7 else math.nan for _ in range(width)]
                before = 0 if pool else starts[r] + first
                row = row if pool else [t if first + k < m else math.nan for k, t in enumerate(row)]
                positives.append(first)
                tables.append(row)
                candidates.append({before + k: t for k, t in enumerate(row) if not math.isnan(t)})
        weights = [rng.random() for _ in queries] if rng.random() < 0.5 else None
        formula = partial(truth, queries, passages, candidates, weights or [1] * len(queries), mean)
        expected, gradients = by_one_rank(formula)
        rows = slice(sum(query_counts[:rank]), sum(query_counts[: rank + 1]))
        columns = slice(starts[rank], starts[rank] + passage_counts[rank])
        mine = []
        for some in (queries[rows], passages[columns]):
            length = max(map(len, some), default=1)
            mask = torch.tensor([[k < len(text) for k in range(length)] for text in some]).reshape(-1, length).bool()
            padded = torch.full((len(some), length, DIM), 50.0, dtype=torch.float64)
            for place, text in zip(padded, some, strict=True):
                place[: len(text)] = text
            mine.append((padded if late else torch.stack([*some, torch.zeros(DIM).double()])[:-1], mask))
        (ours, query_mask), (theirs, passage_mask) = mine
        ours, theirs = ours.requires_grad_(), theirs.requires_grad_()
        learnt = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        width = sum(passage_counts) if pool else passage_counts[rank]
        loss = distill(
            ours, theirs,
            torch.tensor(tables[rows], dtype=torch.float64).reshape(query_counts[rank], width),
            over="pool" if pool else "group", positives=torch.tensor(positives[rows], dtype=torch.int64),
            temperature=learnt, teacher_temperature=2.0, token_reduction="mean" if mean else "sum",
            weights=None if weights is None else torch.tensor(weights[rows], dtype=torch.float64),
            **({"query_mask": query_mask, "passage_mask": passage_mask} if late else {}),
        )  # fmt: skip
        loss.backward()
        parts = [loss.detach().clone(), torch.zeros(()).double() if learnt.grad is None else learnt.grad]
        for part in parts if world_size > 1 else []:
            dist.all_reduce(part)
        torch.testing.assert_close(parts[0] / world_size, expected, msg=str(seed))
        torch.testing.assert_close(parts[1] / world_size, gradients[-1], msg=str(seed))
        for vectors, mask, some, first in ((ours, query_mask, rows, 0), (theirs, passage_mask, columns, len(queries))):
            wanted = gradients[first + some.start : first + some.stop]
            gradient = vectors.grad[mask] if late else vectors.grad
            wanted = torch.cat([gradient.new_empty(0, DIM), *[one.reshape(-1, DIM) for one in wanted]])
            torch.testing.assert_close(gradient / world_size, wanted, msg=str(seed))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_equals_a_loop(pool, world_size):
    pool.run(check, world_size, world_size, range(12))


def match_body(rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    counts = [2, 0, 3]
    weights = torch.rand(5, dtype=torch.float64, generator=generator)
    ours, theirs = (torch.randn(5, DIM, dtype=torch.float64, generator=generator) for _ in range(2))
    some = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    for kind in ("cosine", "mse"):
        whole, mine = ours.clone().requires_grad_(), ours[some].clone().requires_grad_()
        losses = [1 - e @ t / e.norm() / t.norm() if kind == "cosine" else ((e - t) ** 2).mean()
                  for e, t in zip(whole, theirs, strict=True)]  # fmt: skip
        (expected := sum(w * one for w, one in zip(weights.tolist(), losses, strict=True)) / 5).backward()
        loss = match_vectors(mine, theirs[some], kind=kind, weights=weights[some])
        loss.backward()
        dist.all_reduce(total := loss.detach().clone())
        torch.testing.assert_close(total / 3, expected.detach())
        torch.testing.assert_close(mine.grad / 3, whole.grad[some])


def grad_cache_body(rank: int) -> None:
    """Beside the contrastive loss, through GradCache's two passes: the plain step's gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, DIM)).double()
    torch.manual_seed(1 + rank)
    queries, passages = torch.randn(2 + rank, 3).double(), torch.randn(4 + 2 * rank, 3).double()
    scores = torch.randn(2 + rank, 2)
    teacher = torch.randn(2 + rank, 5) @ collectives.all_gather(torch.randn(4 + 2 * rank, 5)).T

    def loss(q: Tensor, p: Tensor) -> Tensor:
        both = distill(q, p, scores) + distill(q, p, teacher, over="pool", teacher_temperature=0.5)
        return info_nce(q, p) + 0.3 * both + match_vectors(torch.cat([q, p]), torch.ones(len(q) + len(p), DIM))

    loss(model(queries), model(passages)).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    step = GradCache(lambda batch: model(batch["x"]), loss, micro_batch_tokens=2, keep_graph_mib=0)
    step({"x": queries}, {"x": passages}, reduce=False)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_vectors_and_grad_cache(pool):
    pool.run(match_body, 3, 0)
    pool.run(grad_cache_body, 2)


def test_a_student_that_scores_as_the_teacher_has_no_loss():
    queries, passages = torch.randn(3, DIM, requires_grad=True), torch.randn(6, DIM)
    loss = distill(
        queries, passages, queries.detach() @ passages.T, over="pool", temperature=0.5, teacher_temperature=0.5
    )
    assert loss.item() == pytest.approx(0, abs=1e-6)
    nothing = distill(queries, passages, torch.full((3, 2), math.nan))
    nothing.backward()
    assert nothing.item() == 0
    assert not queries.grad.any()
    half = distill(queries.bfloat16(), passages.bfloat16(), torch.ones(3, 2))
    assert half.dtype == torch.float32


def disagreeing_body(rank: int) -> None:
    queries, passages = torch.ones(2, DIM), torch.ones(4, DIM)
    with pytest.raises(ValueError, match=r"rank 1: teacher_scores must be floating-point \[2, candidates\], got list"):
        distill(queries, passages, [1.0] if rank else torch.ones(2, 2))
    with pytest.raises(ValueError, match="a column for each of the 8 passages of all ranks, got 4 on rank 0"):
        distill(queries, passages, torch.ones(2, 4), over="pool")
    with pytest.raises(ValueError, match="a column for each of the 4 passages of all ranks, got 0 on rank 1"):
        distill(
            *((queries[:0], passages[:0], torch.ones(0, 0)) if rank else (queries, passages, torch.ones(2, 4))),
            over="pool",
        )


def test_misuse(pool):
    pool.run(disagreeing_body, 2)
    queries, passages = torch.ones(2, DIM), torch.ones(4, DIM)
    for options, message in (
        ({"over": "batch"}, 'over must be "group" or "pool", got \'batch\''),
        ({"teacher_temperature": 0}, "teacher_temperature must be a positive number, got 0"),
        ({"teacher_scores": torch.ones(3, 2)}, r"floating-point \[2, candidates\], got \(3, 2\) float32"),
        ({"teacher_scores": torch.ones(2, 3)}, "go on beyond the last of 4 passages: fill a row up with NaN"),
        ({"teacher_scores": torch.full((2, 2), -math.inf)}, "teacher_scores hold infinity; expected numbers, and NaN"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"queries": torch.ones(0, DIM), "teacher_scores": torch.ones(0, 1)}, "distill has no queries on any rank"),
    ):
        given = {"queries": queries, "passages": passages, "teacher_scores": torch.ones(2, 2), **options}
        with pytest.raises(ValueError, match=message):
            distill(**given)
    for given, message in (
        ((queries, passages, "mse"), "must be alike: project the embeddings"),
        ((queries, [1], "mse"), "must be floating-point tensors"),
        ((queries, queries, "dot"), 'kind must be "cosine" or "mse"'),
    ):
        with pytest.raises(ValueError, match=message):
            match_vectors(*given[:2], kind=given[2])
    for weights in ([1.0, 1.0], torch.tensor([1.0, -1.0]), torch.tensor([1.0, math.nan]), torch.ones(3)):
        with pytest.raises(ValueError, match=r"weights must be floating-point \[2\], one for each text"):
            match_vectors(queries, queries, weights=weights)


def test_numbers_of_numpy_are_floats():
    vectors, scores = torch.eye(2, DIM), torch.tensor([[1.0], [2.0]])
    expected = distill(vectors, vectors, scores, temperature=0.5, teacher_temperature=2)
    assert distill(vectors, vectors, scores, temperature=np.float32(0.5), teacher_temperature=np.float32(2)) == expected
