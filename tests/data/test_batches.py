"""Ids, the batch plan, and the collator."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inbatch.data import BatchPlan, Collator, Example, Passage, stable_id
from inbatch.data.identity import id_texts, merged
from inbatch.data.plan import share
from tests.data_files import tokenize

# ------------------------------------------------------------------------------------------------------------------ ids


def test_stable_id_is_fixed_and_namespaced():
    # Written down once: masks must agree between ranks, machines and versions.
    assert stable_id("wiki", "12") == -2518609581101468838
    assert (
        len(
            {
                stable_id(a, b)
                for a, b in [("wiki", "12"), ("web", "12"), ("wiki1", "2"), ("", "wiki12"), ("wiki12", "")]
            }
        )
        == 5
    )
    many = [stable_id("n", str(i)) for i in range(20_000)]
    assert len(set(many)) == len(many)
    assert -1 not in many
    assert min(many) < -(2**62) < 2**62 < max(many) < 2**63


def test_minus_one_is_never_an_id(monkeypatch):
    class AllOnes:
        def update(self, data):
            pass

        def digest(self):
            return b"\xff" * 8

    monkeypatch.setattr("inbatch.ids.hashlib.blake2b", lambda digest_size: AllOnes())
    assert stable_id("a", "b") != -1


# ----------------------------------------------------------------------------------------------------------- batch plan

plans = st.builds(BatchPlan, st.integers(1, 60), st.integers(1, 25), st.integers(0, 2**32))


@given(plans, st.integers(1, 5), st.integers(0, 3))
def test_ranks_share_out_each_batch(plan, world_size, epoch):
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    for step in steps:
        batch = plan.batch(step)
        shares = [batch[share(len(batch), rank, world_size)] for rank in range(world_size)]
        assert np.array_equal(np.concatenate(shares), batch)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert plan.epoch(step) == epoch
        assert batch.dtype == np.int64
    sizes = [len(plan.batch(step)) for step in steps]
    assert sizes[:-1] == [plan.global_batch_size] * (len(sizes) - 1)
    assert sorted(np.concatenate([plan.batch(step) for step in steps])) == list(range(plan.num_examples))


def test_a_batch_depends_on_seed_and_step_alone():
    plan = BatchPlan(1000, 64, seed=3)
    forward = [plan.batch(step) for step in range(40)]
    for step in (39, 0, 17, 16, 15, 31):  # in any order, from a fresh plan
        assert np.array_equal(BatchPlan(1000, 64, seed=3).batch(step), forward[step])
    assert not np.array_equal(forward[0], forward[16])  # another epoch, another order
    assert not np.array_equal(forward[0], BatchPlan(1000, 64, seed=4).batch(0))
    assert forward[0][:8].tolist() == [
        186,
        20,
        616,
        472,
        320,
        734,
        838,
        536,
    ]  # a resumed run must meet the same batches after an upgrade
    plan.batch(1)[:] = -7  # a caller's batch is its own
    assert plan.batch(1).min() >= 0


@pytest.mark.parametrize("arguments", [(0, 4), (4, 0), (4, 4, -1)])
def test_impossible_plan(arguments):
    with pytest.raises(ValueError, match="got"):
        BatchPlan(*arguments)
    with pytest.raises(ValueError, match="3 examples fill no batch of 4: lower global_batch_size, or set drop_last to"):
        BatchPlan(3, 4, drop_last=True)


# ------------------------------------------------------------------------------------------------------------- collator


def decoded(batch) -> list[str]:
    return ["".join(map(chr, row[row != 0])) for row in batch["input_ids"]]


def collator(**options) -> Collator:
    return Collator(tokenize, **({"query_max_len": 30, "passage_max_len": 40} | options))


EXAMPLES = [
    Example(query="a", positives=(Passage("p0"), Passage("p1"), Passage("p2")), negatives=tuple(map(Passage, "wxyz"))),
    Example(query="b", positives=(Passage("body", "head"),)),
    Example(query="a ", positives=(Passage("p1"),), negatives=(Passage("w"),)),
]


def test_collated_batch():
    batch = collator(query_prefix="q: ", passage_prefix="p: ")(EXAMPLES, epoch=1)
    assert decoded(batch.queries) == ["q: a", "q: b", "q: a "]
    assert decoded(batch.passages) == ["p: p1", "p: w", "p: x", "p: y", "p: z", "p: head body", "p: p1", "p: w"]
    assert batch.positives.tolist() == [0, 5, 6]
    ids = batch.passage_ids
    assert ids[0] == ids[6]  # equal texts of different records
    assert ids[1] == ids[7]
    assert len(set(ids.tolist())) == 6
    assert batch.query_ids[0] == batch.query_ids[2] != batch.query_ids[1]
    assert batch.positive_ids.shape == (3, 3)
    assert ids[0] in batch.positive_ids[0]
    assert (batch.positive_ids == -1).tolist() == [[False] * 3, [False, True, True], [False, True, True]]
    for tensor in (batch.positives, batch.query_ids, ids, batch.positive_ids):
        assert tensor.dtype == torch.int64


def test_positives_and_negatives_take_turns():
    collate = collator(train_n_passages=3)
    seen = [decoded(collate(EXAMPLES[:1], epoch).passages) for epoch in range(4)]
    assert seen == [["p0", "w", "x"], ["p1", "y", "z"], ["p2", "w", "x"], ["p0", "y", "z"]]
    assert decoded(collator(train_n_passages=1)(EXAMPLES, 0).passages) == ["p0", "head body", "p1"]
    with pytest.raises(ValueError, match="train_n_passages must be 1 or more"):
        collator(train_n_passages=0)


def test_lengths_are_passed_on():
    batch = collator(query_max_len=2, passage_max_len=3, query_prefix="q: ")(EXAMPLES, 0)
    assert batch.queries["input_ids"].shape[1] == 2
    assert batch.passages["input_ids"].shape[1] == 3


def test_an_empty_rank_gets_an_empty_batch():
    batch = collator()([], epoch=0)
    assert batch.queries.keys() == batch.passages.keys() == {"input_ids", "attention_mask"}
    for tensors in (batch.queries, batch.passages):
        assert all(
            tensor.shape[0] == 0 and tensor.ndim == 2 and tensor.dtype == torch.int64 for tensor in tensors.values()
        )
    assert batch.positives.shape == batch.query_ids.shape == batch.passage_ids.shape == (0,)
    assert batch.positive_ids.shape == (0, 1)
    assert batch.positives.dtype == batch.query_ids.dtype == batch.passage_ids.dtype == torch.int64


def test_equal_texts_or_equal_ids_of_a_corpus_are_one():
    def example(corpus, doc_id, text, query="q", query_id=None):
        return Example(query=query, query_id=query_id, positives=(Passage(text, doc_id=doc_id),), corpus=corpus)

    examples = [
        example("wiki", "12", "t", "why", "1"),
        example("wiki", "12", "u", "why not", "1"),  # an id with another text
        example("wiki", "13", " t ", "why", "2"),  # a text under another id
        example("web", "12", "v", "how", "1"),  # an id of another corpus
        example("web", None, "u", "why not"),  # a text of another corpus, without id
        example("web", "14", "w"),
    ]
    batch = collator(same=merged(id_texts(examples)))(examples, 0)
    for ids in (batch.passage_ids.tolist(), batch.query_ids.tolist()):
        assert ids[0] == ids[1] == ids[2] == ids[4]
        assert len({ids[0], ids[3], ids[5]}) == 3
    assert merged(id_texts(examples[2:])) == {}  # nothing to merge where each id has one text
    plain = collator()(examples, 0).passage_ids.tolist()
    assert plain[0] == plain[2] != plain[1]


def test_sharing_an_id_carries_over():
    texts = [("1", "a"), ("1", "b"), ("2", "b"), ("2", "c"), ("3", "c"), ("4", "d"), ("5", "e"), ("5", "f")]
    examples = [Example(query=f"{i}", positives=(Passage(t, doc_id=d),)) for i, (d, t) in enumerate(texts)]
    ids = collator(same=merged(id_texts(examples)))(examples, 0).passage_ids.tolist()
    assert len(set(ids[:5])) == 1
    assert ids[6] == ids[7]
    assert len({ids[0], ids[5], ids[6]}) == 3


def test_a_prefix_that_the_data_brings_replaces_the_usual_one():
    examples = [
        Example(query="a", positives=(Passage("p"),), query_prefix="task: ", passage_prefix="doc: "),
        Example(query="b", positives=(Passage("p"),), query_prefix=""),
        Example(query="c", positives=(Passage("p"),)),
    ]
    batch = collator(query_prefix="q: ", passage_prefix="p: ")(examples, 0)
    assert decoded(batch.queries) == ["task: a", "b", "q: c"]
    assert decoded(batch.passages) == ["doc: p", "p: p", "p: p"]
    assert len(set(batch.passage_ids.tolist())) == 1


def test_the_collator_travels_to_workers():
    collate = pickle.loads(pickle.dumps(collator(train_n_passages=2)))
    batch = collate(EXAMPLES, 0)
    assert torch.equal(batch.passage_ids, collator(train_n_passages=2)(EXAMPLES, 0).passage_ids)
