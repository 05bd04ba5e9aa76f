"""PyLate's contrastive losses by ours: equal on one process, and exact over two."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from inbatch.testing import assert_gradient_parity
from tests.tiny_models import save_tiny

pytest.importorskip("pylate")  # it asks for other versions than the extra dev
from pylate import losses, models  # pyright: ignore[reportMissingImports]

from inbatch.integrations.pylate import CachedContrastive, Contrastive

QUERIES = ["the cat sat", "a red dog ran fast", "who is slow", "where of a blue mat", "what is it", "the mat"]
DOCUMENTS = [["cat on mat", "dog ran", "the slow dog is the cat", "blue mat on a red mat", "a the", "red"]]
DOCUMENTS += [["dog", "a blue cat", "red mat", "who", "fast fast", "slow"]]


def columns_of(model, start: int, stop: int) -> tuple[dict[str, torch.Tensor], ...]:
    columns = [model.tokenize(QUERIES[start:stop], is_query=True)]
    columns += [model.tokenize(texts[start:stop], is_query=False, pad=True) for texts in DOCUMENTS]
    return tuple({name: c[name] for name in ("input_ids", "attention_mask")} for c in columns)


def run(cls, model, batch, **options):
    loss = cls(model, temperature=0.5, **options)([dict(one) for one in batch])
    loss.backward()
    return loss


def theirs(model, batch):
    return run(losses.Contrastive, model, batch)


def plain(model, batch):
    return run(Contrastive, model, batch)


def cached(model, batch):
    return run(CachedContrastive, model, batch, mini_batch_size=2)


def wrapped(model):
    return DistributedDataParallel(model, find_unused_parameters=True, broadcast_buffers=False)


def parity(rank: int, folder: str) -> None:
    model = models.ColBERT(folder, device="cpu", query_length=12, document_length=16).eval()
    for step in (plain, cached):
        assert_gradient_parity(
            step, model, [columns_of(model, 0, 4), columns_of(model, 4, 6)], reference=theirs, wrap=wrapped
        )


def test_two_uneven_processes_have_the_gradient_of_theirs_on_one(pool, tmp_path):
    pool.run(parity, 2, str(save_tiny("bert", tmp_path)), timeout_s=120)


def test_what_has_no_meaning_is_refused():
    with pytest.raises(ValueError, match="leave it out"):
        Contrastive(torch.nn.Linear(1, 1), size_average=False)
    with pytest.raises(ValueError, match="leave it out for MaxSim"):
        Contrastive(torch.nn.Linear(1, 1), torch.cdist)
