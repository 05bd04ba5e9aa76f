"""The multi-vector loss of sentence-transformers by ours: equal on one process, and exact over two."""

import numpy as np
import pytest
import torch
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.multi_vector_encoder import losses
from sentence_transformers.multi_vector_encoder.data_collator import MultiVectorEncoderDataCollator
from torch.nn.parallel import DistributedDataParallel

from inbatch.integrations.multi_vector import (
    CachedMultiVectorMultipleNegativesRankingLoss,
    MultiVectorMultipleNegativesRankingLoss,
)
from inbatch.integrations.sentence_transformers import Collator
from inbatch.testing import assert_gradient_parity
from tests.integrations.test_sentence_transformers import assert_equal, gradients, records
from tests.tiny_models import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = MultiVectorEncoder(str(save_tiny("bert", tmp_path_factory.mktemp("backbone"))), device="cpu")
    path = tmp_path_factory.mktemp("multi")
    model.save_pretrained(str(path))
    return str(path)


def columns_of(model, start: int, stop: int) -> tuple[dict[str, torch.Tensor], ...]:
    texts = [column[start:stop] for column in records(9).values()]
    columns = [model.preprocess(some, task="document" if n else "query") for n, some in enumerate(texts)]
    return tuple({name: c[name] for name in ("input_ids", "attention_mask")} for c in columns)


def test_value_and_gradient_are_theirs(folder):
    model = MultiVectorEncoder(folder, device="cpu")
    features = columns_of(model, 0, 6)
    results = []
    for cls in (losses.MultiVectorMultipleNegativesRankingLoss, MultiVectorMultipleNegativesRankingLoss):
        loss = cls(model, scale=2.0)([dict(one) for one in features])
        results.append((loss.item(), gradients(model, loss)))
    loss = CachedMultiVectorMultipleNegativesRankingLoss(model, scale=2.0, mini_batch_num_tokens=20)(features)
    results.append((loss.item(), gradients(model, loss)))
    (expected, their_gradient), *ours = results
    for value, our_gradient in ours:
        assert value == pytest.approx(expected, rel=1e-5)
        assert_equal(our_gradient, their_gradient)
    with pytest.warns(UserWarning, match="mini_batch_size is not used: no grid"):
        MultiVectorMultipleNegativesRankingLoss(model, mini_batch_size=8)
    with pytest.warns(UserWarning, match="show_progress_bar is not used"):
        CachedMultiVectorMultipleNegativesRankingLoss(model, show_progress_bar=True)
    ids = torch.arange(12).reshape(6, 2)
    ids[1, 0] = ids[0, 0]
    loss = MultiVectorMultipleNegativesRankingLoss(model, scale=np.float32(2.0))  # type: ignore[arg-type]
    assert loss(features, ids) < expected, "a copy of a positive is no negative"
    with pytest.raises(ValueError, match="leave it out for MaxSim"):
        MultiVectorMultipleNegativesRankingLoss(model, similarity_fct=torch.cdist)
    with pytest.raises(ValueError, match="scale is 1 / temperature: give one of them, got scale="):
        MultiVectorMultipleNegativesRankingLoss(model, scale=2.0, temperature=0.5)
    with pytest.raises(ValueError, match="scale must be a number above 0, got 0"):
        MultiVectorMultipleNegativesRankingLoss(model, scale=0)
    with pytest.raises(ValueError, match=r"gather_across_devices=False is negatives='local': .*'ring'"):
        MultiVectorMultipleNegativesRankingLoss(model, gather_across_devices=False, negatives="ring")
    with pytest.raises(ValueError, match="two columns or more"):
        loss(features[:1])


def test_the_collator_of_ids_makes_queries_and_documents(folder):
    model = MultiVectorEncoder(folder, device="cpu", prompts={"query": "query ", "document": "document "})
    rows = [dict(zip(records(3), values, strict=True)) for values in zip(*records(3).values(), strict=True)]
    expected, found = MultiVectorEncoderDataCollator(model.preprocess)(rows), Collator(model.preprocess)(rows)
    assert found.pop("label").shape == (3, 3)
    assert found.keys() == expected.keys() >= {"anchor_task", "anchor_input_ids"}
    for name, value in expected.items():
        assert torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value, name


def step(model, batch, cls=MultiVectorMultipleNegativesRankingLoss):
    loss = cls(model, scale=2.0)([dict(one) for one in batch])
    loss.backward()
    return loss


def cached_step(model, batch):
    loss = CachedMultiVectorMultipleNegativesRankingLoss(model, scale=2.0, mini_batch_num_tokens=20)
    value = loss([dict(one) for one in batch])
    value.backward()
    return value


def theirs_alone(model, batch):
    return step(model, batch, losses.MultiVectorMultipleNegativesRankingLoss)


def wrapped(model):
    return DistributedDataParallel(model, find_unused_parameters=True)


def parity(rank: int, folder: str) -> None:
    model = MultiVectorEncoder(folder, device="cpu")
    batches = [columns_of(model, 0, 5), columns_of(model, 5, 9)]
    for one in (step, cached_step):
        assert_gradient_parity(one, model, batches, reference=theirs_alone, wrap=wrapped)


def test_two_uneven_processes_have_the_gradient_of_one(pool, folder):
    pool.run(parity, 2, folder, timeout_s=120)
