"""assert_gradient_parity: what is exact passes, and every error that trainers make is named."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from inbatch import collectives, info_nce
from inbatch.inbatch_neg_utils import dist_gather_tensor, positive_columns
from inbatch.testing import _in_processes, assert_gradient_parity, gradient_parity
from inbatch.testing.audit import audit, inbatch_rows, lines
from tests.helpers import REPOSITORY

TEMPERATURE = 0.1


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.passage = nn.Linear(6, 8), nn.Linear(6, 8)
        self.log_temperature = nn.Parameter(torch.tensor(-2.0))

    def forward(self, batch):
        towers = (self.query, self.passage)
        return *(F.normalize(t(x), dim=1) for t, x in zip(towers, batch, strict=True)), self.log_temperature.exp()


def batches(*rows):
    torch.manual_seed(1)
    return [(torch.randn(n, 6, dtype=torch.float64), torch.randn(2 * n, 6, dtype=torch.float64)) for n in rows]


def model():
    return Towers().double()


def gathered(kind, model, batch):
    """The ways in which trainers compute it, by name."""
    q, p, temperature = model(batch)
    size = collectives.world_size()
    everyone = p if kind == "local" else dist_gather_tensor(p, preserve_grad=kind != "detached")
    labels = torch.arange(len(q)) * 2 if kind == "local" else positive_columns(len(q), 2)
    factor = {"W": size, "1/W": 1 / size, "b x W": 12 if size > 1 else 1}.get(kind, 1)
    loss = F.cross_entropy(q @ everyone.T / temperature, labels) * factor
    loss.backward()
    return loss


def ours(model, batch, **options):
    q, p, temperature = model(batch)
    loss = info_nce(q, p, temperature=temperature, **options)
    loss.backward()
    return loss


def test_it_starts_processes_and_passes_what_is_exact():
    found = assert_gradient_parity(ours, model(), batches(3, 2), towers=("query", "passage"))
    assert found.exact
    assert found.rows == (3, 2)
    assert found.error < 1e-12
    assert found.scalars == pytest.approx({"log_temperature": 1.0})
    assert found.loss_ratio == pytest.approx(1)
    assert "cosine 1.000000" in str(found)


def check_kinds(rank: int, size: int):
    rows = (12 // size,) * size
    reference = gathered_alone
    for kind, words in {
        "exact": "exact",
        "W": "wrong scale: W times too large",
        "1/W": "wrong scale: 1/W of it",
        "b x W": "wrong scale: b x W times too large",
        "local": "local negatives",
        "detached": "detached",
    }.items():
        found = gradient_parity(
            partial(gathered, kind), model(), batches(*rows), reference=reference, towers=("query", "passage")
        )
        assert found.looks_like.startswith(words), (kind, str(found))
        assert found.exact == (kind == "exact")
        if kind == "detached":
            assert found.towers["query"] == pytest.approx((1, 1))
            assert found.towers["passage"][0] < 0.95
        if kind != "exact":
            with pytest.raises(AssertionError, match=words.split(":")[0]):
                assert_gradient_parity(partial(gathered, kind), model(), batches(*rows), reference=reference)
    unwrapped = gradient_parity(ours, model(), batches(*rows), reference=reference, wrap=None)
    assert unwrapped.looks_like.startswith("nobody averages")
    uneven = batches(*range(1, size + 1))
    assert_gradient_parity(ours, model(), uneven, reference=reference)
    assert not gradient_parity(partial(gathered, "exact"), model(), uneven, reference=reference).exact  # mean of means


def gathered_alone(model, batch):
    q, p, temperature = model(batch)
    loss = F.cross_entropy(q @ p.T / temperature, torch.arange(len(q)) * 2)
    loss.backward()
    return loss


@pytest.mark.parametrize("size", [2, 3])
def test_every_error_is_named_under_a_launcher(pool, size):
    pool.run(check_kinds, size, size)


def check_same_step() -> bool:
    return assert_gradient_parity(ours, model(), batches(2, 3)).exact


def test_under_a_launcher_the_step_is_its_own_reference():
    """In processes that may start one more: the reference runs without a group."""
    assert _in_processes([check_same_step] * 2, group=True) == [True, True]


def clears(model, batch):
    loss = ours(model, batch)
    found = {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return loss, found


def names_of_the_wrapper(model, batch):
    loss, found = clears(model, batch)
    return loss, {f"module.{name}": gradient for name, gradient in found.items()}


def check_mistakes(rank: int):
    assert_gradient_parity(clears, model(), batches(2, 3), reference=gathered_alone)
    with pytest.raises(ValueError, match="got 3 batches; expected 2, one for each process"):
        gradient_parity(ours, model(), batches(1, 1, 1))
    with pytest.raises(ValueError, match="no parameter of 'encoder' has a gradient"):
        gradient_parity(ours, model(), batches(1, 1), reference=gathered_alone, towers=("encoder",))
    with pytest.raises(ValueError, match=r"a gradient of 'module\.\S+': the model has no such parameter"):
        gradient_parity(names_of_the_wrapper, model(), batches(2, 3), reference=gathered_alone)
    with pytest.raises(ValueError, match="left no gradient"):
        gradient_parity(ours, model(), batches(1, 1), reference=lambda model, batch: 0.0)


def test_a_step_may_return_gradients_and_mistakes_are_named(pool):
    pool.run(check_mistakes, 2)
    with pytest.raises(ValueError, match="got 1 batches; expected one for each of two or more processes"):
        gradient_parity(ours, model(), batches(1))


class Batch(NamedTuple):
    """A constant before what has rows."""

    temperature: float | torch.Tensor
    inputs: torch.Tensor


class Shifted(nn.Linear):
    """A bias of all classes alike, whose gradient is zero but for rounding."""

    def __init__(self):
        super().__init__(6, 8, bias=False, dtype=torch.float64)
        self.shift = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, inputs):
        return super().forward(inputs) + self.shift


def classify(model, batch):
    loss = F.cross_entropy(model(batch.inputs) / batch.temperature, torch.zeros(len(batch.inputs), dtype=torch.long))
    loss.backward()
    return loss


def check_constants(rank):
    for temperature in (0.1, torch.tensor(0.1)):
        parts = [Batch(temperature, queries) for queries, _ in batches(3, 3)]
        assert assert_gradient_parity(classify, Shifted(), parts, reference=classify).rows == (3, 3)
    with pytest.raises(ValueError, match="the step returned None; it must return the loss"):
        gradient_parity(lambda model, batch: None, Shifted(), parts, reference=classify)
    frozen = Shifted()
    frozen.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter with several elements has a gradient"):
        gradient_parity(classify, frozen, parts, reference=classify)
    with pytest.raises(ValueError, match=r"batches have other names than \['a'\]: give join="):
        gradient_parity(classify, frozen, [{"a": 1}, {"b": 1}], reference=classify)


def test_constants_in_batches_and_a_gradient_of_zero(pool):
    pool.run(check_constants, 2)


def check_audit(rank):
    rows = list(audit(inbatch_rows()))
    said = [found if isinstance(found, str) else found.looks_like.split(":")[0] for _, found in rows]
    assert said == ["exact", "exact", "local negatives", "exact", "exact", "exact", "detached", "exact"], said
    table = list(lines(iter(rows)))
    assert len(table) == 10
    assert table[2].startswith("| inbatch | info_nce, gather | 1.000, 1.000 | 1.000, 1.000 | 1.000, 1.000 | 1.000 |")
    if rank == 0:
        page = (REPOSITORY / "docs" / "gradient.md").read_text()
        assert set(table[2:]) <= set(page.splitlines()), "docs/gradient.md has the table as it is printed"


def test_the_audit_finds_what_the_docs_say(pool):
    pool.run(check_audit, 2)
