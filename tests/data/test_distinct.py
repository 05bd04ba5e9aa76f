"""Batches without duplicates: those of a plain loop, on real records, and the same from any step."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from inbatch.data import BatchPlan, open_examples
from inbatch.data.distinct import DistinctBatches, Keys, Shuffled
from inbatch.data.identity import keys_of
from inbatch.train.config import Config, DataConfig, ModelConfig, TrainConfig
from inbatch.train.setup import open_training_data, plan_mixture
from tests.data_files import write_beir, write_jsonl


def keys(rows: list[set[int]]) -> Keys:
    flat = [key for row in rows for key in sorted(row)]
    return Keys(np.cumsum([0, *map(len, rows)]), np.array(flat, np.int64))


def by_hand(rows: list[set[int]], order: list[int], size: int, batches: int) -> list[list[int]]:
    """What the class says in words, an example at a time."""
    waiting, left, made = [], list(order), []
    for _ in range(batches):
        taken, used, ahead = [], set(), waiting[: 2 * size]
        later = waiting[2 * size :]
        seen, passed = 0, []
        for number, row in enumerate([*ahead, *left, *later]):
            if len(taken) == size:
                break
            seen = number + 1
            if rows[row] & used:
                passed.append(row)
            else:
                taken.append(row)
                used |= rows[row]
        # Those that wait are looked at beyond two batches of them only where the order ends within this batch.
        everything = [*ahead, *left, *later]
        untouched = everything[seen:]
        old = {*waiting}
        waiting = [row for row in waiting if row in {*passed, *untouched}] + [row for row in passed if row not in old]
        left = [row for row in left if row in {*untouched}]
        made.append(taken)
    return made


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_batches_are_those_of_a_plain_loop(data):
    kinds = data.draw(st.integers(1, 40))
    rows = data.draw(st.lists(st.sets(st.integers(0, kinds), min_size=1, max_size=4), min_size=1, max_size=60))
    size = data.draw(st.integers(1, 12))
    order = data.draw(st.permutations(range(len(rows))))
    steps = -(-len(rows) // size)
    batches = DistinctBatches(keys(rows), np.array(order), size)
    made = [batches.batch(step).tolist() for step in range(steps)]
    assert made == by_hand(rows, order, size, steps)
    assert all(made)
    seen = [row for batch in made for row in batch]
    assert len({*seen}) == len(seen) == len(rows) - batches.left_out(steps)
    for batch in made:
        assert len({key for row in batch for key in rows[row]}) == sum(len(rows[row]) for row in batch)


def test_a_plan_is_the_same_from_any_step_and_says_what_it_leaves_out():
    chance = np.random.default_rng(0)
    rows = [{int(key)} for key in chance.integers(0, 300, 1000)]
    plan, again = (BatchPlan(1000, 100, seed=5, keys=keys(rows)) for _ in range(2))
    whole = [plan.batch(step).tolist() for step in range(20)]
    assert [again.batch(step).tolist() for step in (17, 4, 11)] == [whole[17], whole[4], whole[11]]
    assert whole[:10] != whole[10:]
    assert [plan.left_out(step) for step in range(10)] == [0] * 9 + [1000 - sum(map(len, whole[:10]))]
    # One key in every second row: it fills one place of each batch.
    rows = [{-1} if row % 2 else {row} for row in range(100)]
    plan = BatchPlan(100, 10, keys=keys(rows))
    assert sum(rows[row] == {-1} for step in range(10) for row in plan.batch(step)) == 10
    assert plan.left_out(9) == 40


def test_a_slice_of_a_permutation_is_that_of_the_whole():
    """The whole is an argsort of the raw stream, as it was in every version."""
    for n in (1, 5, 300_000):
        whole = np.argsort(np.random.PCG64(np.random.SeedSequence([7, 3])).random_raw(n), kind="stable")
        shuffled = Shuffled(n, 7, 3)
        assert len(shuffled) == n
        for start, stop in ((0, n), (0, 1), (n - 1, n), (n // 3, n // 2), (n, n), (n // 2, 2 * n)):
            assert shuffled[start:stop].tolist() == whole[start:stop].tolist()


def test_examples_that_share_a_text_or_an_id_are_apart(tmp_path):
    texts = write_jsonl(
        tmp_path / "texts.jsonl",
        [{"query": f"q{i % 20}", "pos": [f"p{i % 13}", f" p{i % 13 + 1} "], "neg": ["n"]} for i in range(60)],
    )
    by_id = [("q0", "d0", 1), ("q1", "d0", 1), ("q2", "d2", 1), ("q3", "d3", 1), ("q3", "d2", 1)]
    beir = write_beir(tmp_path / "beir", qrels={"train": by_id})
    config = Config(
        model=ModelConfig(name_or_path="m"),
        data=DataConfig(train=[str(texts), str(beir)], no_duplicates=True),
        train=TrainConfig(output_dir="o", global_batch_size=6),
    )
    examples = open_training_data(config)
    plan = plan_mixture(config, examples)
    seen = []
    for step in range(plan.steps_per_epoch):
        batch = [examples[int(row)] for row in plan.batch(step)]
        seen += plan.batch(step).tolist()
        for texts_of in (lambda e: [e.query], lambda e: [p.full_text.strip() for p in e.positives]):
            shared = [text for example in batch for text in {*texts_of(example)}]
            assert len({*shared}) == len(shared)
    assert len({*seen}) == len(seen) > 50


def test_texts_of_one_id_share_a_key():
    records = [
        {"query": "a", "positive_passages": [{"docid": "1", "text": "x"}], "negative_passages": []},
        {"query": "b", "positive_passages": [{"docid": "1", "text": "y"}], "negative_passages": []},
        {"query": "c", "positive_passages": [{"docid": "2", "text": "z"}], "negative_passages": []},
    ]
    examples = open_examples(records)
    source = examples.sources[0]
    found = keys_of(source.examples, examples.same, source.also, None)
    of_row = [{*found.keys[a:b].tolist()} for a, b in zip(found.offsets, found.offsets[1:], strict=False)]
    assert of_row[0] & of_row[1]
    assert not of_row[2] & (of_row[0] | of_row[1])
