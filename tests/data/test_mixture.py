"""Batches from several sources: shares, passes, one source a batch, the same for any number of ranks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inbatch.data import BatchPlan, Collator, Example, Mixture, Passage
from inbatch.data.batches import Batches

mixtures = st.builds(
    Mixture,
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5).map(tuple),
    global_batch_size=st.integers(1, 9),
    seed=st.integers(0, 5),
    mixed=st.booleans(),
)
shares = st.lists(st.floats(0.01, 10), min_size=5, max_size=5)


def of_epoch(plan: Mixture, epoch: int) -> list:
    return [plan.rows(epoch * plan.steps_per_epoch + place) for place in range(plan.steps_per_epoch)]


@settings(deadline=None)
@given(mixtures, st.integers(0, 3))
def test_an_epoch_visits_every_example_once_where_no_weights_are_given(plan, epoch):
    steps = of_epoch(plan, epoch)
    assert sorted(np.concatenate([rows.examples for rows in steps])) == list(range(plan.num_examples))
    assert all((rows.passes == epoch).all() for rows in steps)
    first = np.cumsum([0, *plan.sizes])
    for rows in steps:
        assert (np.searchsorted(first, rows.examples, side="right") - 1 == rows.sources).all()
        assert plan.mixed or len(set(rows.sources.tolist())) == 1


@settings(deadline=None)
@given(mixtures, shares, st.integers(1, 4))
def test_weights_are_kept_to_one_draw_and_each_source_is_read_in_passes(plan, weights, epochs):
    weights = tuple(weights[: len(plan.sizes)])
    plan = replace(plan, weights=weights)
    draws = sum(plan.draws(epoch) for epoch in range(epochs))
    expected = np.array(weights) / sum(weights) * epochs * plan.draws_per_epoch
    assert (np.abs(draws - expected) < len(weights)).all()
    assert draws.sum() == epochs * plan.draws_per_epoch
    rows = [rows for epoch in range(epochs) for rows in of_epoch(plan, epoch)]
    examples, sources, passes = (np.concatenate(part) for part in zip(*rows, strict=True))
    for source, size in enumerate(plan.sizes):
        mine = sources == source
        _, times = np.unique(examples[mine], return_counts=True)
        assert len(times) == 0 or times.max() <= -(-int(mine.sum()) // size)  # nothing twice before all were read once
        for number in set(passes[mine].tolist()):
            assert len(set(examples[mine & (passes == number)].tolist())) == (mine & (passes == number)).sum() <= size


def test_one_source_is_drawn_as_a_plan_of_its_own():
    alone, plan = BatchPlan(23, 4, seed=7), Mixture(sizes=(23,), global_batch_size=4, seed=7)
    assert plan.steps_per_epoch == alone.steps_per_epoch
    for step in range(3 * alone.steps_per_epoch):
        rows = plan.rows(step)
        assert (rows.examples == alone.batch(step)).all()
        assert {*rows.sources.tolist()} == {0}
        assert {*rows.passes.tolist()} == {alone.epoch(step)}


def test_wrong_weights_and_steps_are_refused():
    with pytest.raises(ValueError, match="2 positive numbers"):
        Mixture(sizes=(3, 4), global_batch_size=2, weights=(1.0,))
    with pytest.raises(ValueError, match="2 positive numbers"):
        Mixture(sizes=(3, 4), global_batch_size=2, weights=(1.0, 0.0))
    with pytest.raises(ValueError, match="count from 0"):
        Mixture(sizes=(3, 4), global_batch_size=2).rows(-1)


# ---- batches


def tokenize(texts: list[str], max_length: int) -> dict:
    ids = torch.tensor([[int((text.split() or ["0"])[-1]) + 1] * max_length for text in texts])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def examples_of(sizes: tuple[int, ...]) -> list[Example]:
    made = []
    for source, size in enumerate(sizes):
        for _ in range(size):
            number = len(made)
            negatives = tuple(Passage(f"n{k} {number}") for k in range(source + 1))
            made.append(Example(query=f"q {number}", positives=(Passage(f"p {number}"),), negatives=negatives))
    return made


USUAL = Collator(tokenize, query_max_len=2, passage_max_len=3)
COLLATORS = [
    USUAL,
    replace(USUAL, negatives="own", train_n_passages=2),
    replace(USUAL, loss_weight=0.5, query_max_len=4),
]


@pytest.mark.parametrize("mixed", [False, True])
def test_ranks_share_out_the_same_global_batch_and_agree_on_what_is_passed(mixed):
    plan = Mixture(sizes=(9, 14, 6), global_batch_size=5, weights=(1.0, 2.0, 1.0), mixed=mixed)
    collators = [replace(collator, query_max_len=2) for collator in COLLATORS] if mixed else COLLATORS
    examples = examples_of(plan.sizes)

    def step_of(step: int, rank: int, world_size: int):
        return Batches(examples, plan, collators, rank=rank, world_size=world_size).step(step)[0].batch

    seen = set()
    for step in range(2 * plan.steps_per_epoch):
        sources = plan.rows(step).sources.tolist()
        whole = step_of(step, 0, 1)
        assert (whole.queries["input_ids"][:, 0] - 1 == torch.from_numpy(plan.batch(step))).all()
        for world_size in (2, 4):
            parts = [step_of(step, rank, world_size) for rank in range(world_size)]
            for name in ("query_ids", "passage_ids", "candidates", "weights", "mask_own_negatives"):
                present = {getattr(part, name) is not None for part in (whole, *parts)}
                assert len(present) == 1, (name, "is passed by some ranks alone")
                if present == {True}:
                    assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
        expected = [{0: 0, 1: 2, 2: 0}[source] for source in sources]
        assert whole.candidates is None if 1 not in sources else whole.candidates.tolist() == expected
        weights = [{0: 1.0, 1: 1.0, 2: 0.5}[source] for source in sources]
        assert whole.weights is None if 2 not in sources else whole.weights.tolist() == weights
        sizes = [{0: 2, 1: 2, 2: 4}[source] for source in sources]
        assert whole.positives.tolist() == np.cumsum([0, *sizes])[:-1].tolist()
        assert whole.regular == (len(set(sizes)) == 1)
        if not mixed:
            assert whole.queries["input_ids"].shape[1] == COLLATORS[sources[0]].query_max_len
        seen |= set(sources)
    assert seen == {0, 1, 2}


def test_batches_come_from_workers_as_they_are_made_here():
    plan = Mixture(sizes=(9, 14, 6), global_batch_size=5)
    batches = Batches(examples_of(plan.sizes), plan, COLLATORS, rank=0, world_size=1)
    for here, there in zip(
        batches.ahead_from(0, 6, num_workers=0), batches.ahead_from(0, 6, num_workers=1), strict=True
    ):
        for name, value in vars(here[0].batch).items():
            other = getattr(there[0].batch, name)
            if isinstance(value, dict):
                assert all((other[key] == value[key]).all() for key in value)
            else:
                assert (other is None) == (value is None)
                assert value is None or torch.equal(other, value)
