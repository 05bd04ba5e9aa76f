"""info_nce in one process: numbers, edges, messages."""

import math
import os
from contextlib import suppress

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode

from inbatch.losses import (
    CLIP,
    GTE,
    QWEN3_EMBEDDING,
    FalseNegatives,
    InfoNCELoss,
    LossStats,
    Objective,
    info_nce,
    tiled,
)
from tests.helpers import device

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what CUDA needs to be deterministic

IMPLS = ["reference", "tiled"]
FLOAT32_IMPLS = [*IMPLS, "fused"] if device().type == "cuda" else IMPLS


@pytest.fixture(autouse=True)
def _fresh_buffers_hold_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def correlated(rows: int, group: int, dim: int, noise: float = 1.0, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    """Unit queries and passages, each query near its positive, which is the first of its group."""
    generator = torch.Generator().manual_seed(rows * 1000 + dim)
    queries = torch.randn(rows, dim, dtype=torch.float64, generator=generator)
    passages = torch.randn(rows * group, dim, dtype=torch.float64, generator=generator)
    passages[::group] = queries + noise * passages[::group]
    return F.normalize(queries, dim=1).to(device(), dtype), F.normalize(passages, dim=1).to(device(), dtype)


def gradients_of(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [gradient.double() for gradient in torch.autograd.grad(loss, leaves)]


def eager(queries: Tensor, passages: Tensor, temperature: float, group: int) -> Tensor:
    """The formula as everybody writes it, in the dtype of its inputs."""
    labels = torch.arange(0, len(passages), group, device=queries.device)
    return F.cross_entropy(queries @ passages.T / temperature, labels)


def relative(ours: Tensor, true: Tensor) -> float:
    return float((ours.detach().double() - true.detach()).norm() / true.detach().norm().clamp_min(1e-12))


# ---- numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.05, 0.02])
def test_error_against_float64_is_within_twice_the_eager_formulas(dtype, temperature):
    for rows, group, dim in [(1, 1, 1), (1, 63, 7), (63, 1, 257), (63, 3, 63), (257, 2, 1), (257, 1, 257)]:
        queries, passages = (each.requires_grad_() for each in correlated(rows, group, dim, dtype=dtype))
        exact = [each.detach().double().requires_grad_() for each in (queries, passages)]
        true_loss = eager(*exact, temperature, group)
        true = [true_loss, *gradients_of(true_loss, *exact)]
        eager_loss = eager(queries, passages, temperature, group)
        theirs = [eager_loss, *gradients_of(eager_loss, queries, passages)]
        for impl in FLOAT32_IMPLS:
            loss = info_nce(queries, passages, temperature=temperature, impl=impl, chunk_mib=0.01)
            ours = [loss, *gradients_of(loss, queries, passages)]
            floor = 4 * torch.finfo(dtype).eps + 2e-6  # rounding of the gradient itself; of float32 scores near 50
            for name, own, other, exactly in zip(("loss", "dq", "dp"), ours, theirs, true, strict=True):
                error, bound = relative(own, exactly), 2 * relative(other, exactly) + floor
                # A gradient that is zero but for rounding has no relative error.
                small = float((own.detach().double() - exactly.detach()).abs().max()) <= 1e-6
                assert error <= bound or small, f"{impl}, {(rows, group, dim)}: {name} error {error:.2e} > {bound:.2e}"


@pytest.mark.parametrize("impl", FLOAT32_IMPLS[1:])
def test_half_precision_gradient_error_stays_at_its_rounding(impl):
    queries, passages = (each.requires_grad_() for each in correlated(256, 4, 64, noise=0.5, dtype=torch.bfloat16))
    exact = [each.detach().double().requires_grad_() for each in (queries, passages)]
    true = gradients_of(eager(*exact, 0.01, 4), *exact)
    for own, exactly in zip(
        gradients_of(info_nce(queries, passages, temperature=0.01, impl=impl), queries, passages), true, strict=True
    ):
        assert relative(own, exactly) <= 2.5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_losses_keep_their_digits(dtype):
    queries = torch.eye(4, dtype=dtype, device=device()).requires_grad_()
    passages = torch.eye(4, dtype=dtype, device=device()).requires_grad_()
    temperature = torch.tensor(1 / 22, dtype=dtype, device=device(), requires_grad=True)
    scale = 1 / temperature.item()
    for objective in (None, Objective(directions=("query_to_passage", "passage_to_query"))):
        loss = info_nce(queries, passages, temperature=temperature, impl="tiled", objective=objective)
        negatives = 3 if objective is None else 6
        expected = math.log1p(negatives * math.exp(-scale))
        assert expected < 2e-9
        rtol = 1e-5 if dtype == torch.float32 else 1e-12
        assert loss.item() == pytest.approx(expected, rel=rtol)
        (gradient,) = torch.autograd.grad(loss, [temperature])
        share = negatives * math.exp(-scale) / (1 + negatives * math.exp(-scale))
        assert gradient.item() == pytest.approx(share * scale**2, rel=rtol)


@pytest.mark.parametrize("impl", FLOAT32_IMPLS)
@pytest.mark.parametrize("objective", [None, GTE, CLIP])
def test_rows_whose_negatives_beat_the_positive_by_hundreds_of_nats_are_exact(impl, objective):
    queries, passages = correlated(9, 2, 5)
    queries = (queries * torch.linspace(0.1, 40, 9, device=device(), dtype=torch.float64)[:, None]).float()
    passages = passages.float()
    passages[::2] *= -1  # most positives are the worst of all
    exact = [each.double().requires_grad_() for each in (queries, passages)]
    ours = [each.clone().requires_grad_() for each in (queries, passages)]
    options = {"temperature": 0.1, "objective": objective}
    true_loss = info_nce(*exact, impl="reference", **options)
    loss = info_nce(*ours, impl=impl, chunk_mib=1e-3, **options)
    assert true_loss > 100
    assert loss.item() == pytest.approx(true_loss.item(), rel=1e-6)
    true = gradients_of(true_loss, *exact)
    for own, exactly in zip(gradients_of(loss, *ours), true, strict=True):
        assert relative(own, exactly) < 1e-5


@pytest.mark.parametrize("impl", FLOAT32_IMPLS)
def test_rows_with_only_their_positive_have_no_loss(impl):
    queries, passages = correlated(3, 2, 4, dtype=torch.float32)
    queries.requires_grad_()
    passages.requires_grad_()
    temperature = torch.tensor(0.05, device=device(), requires_grad=True)
    everything_is_one = FalseNegatives(torch.full((6,), 7, device=device()))
    loss = info_nce(queries, passages, temperature=temperature, false_negatives=everything_is_one, impl=impl)
    loss.backward()
    assert loss.item() == 0
    for leaf in (queries, passages, temperature):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))
    one = info_nce(queries[:1], passages[:1], impl=impl)
    assert one.item() == 0


@pytest.mark.parametrize("impl", FLOAT32_IMPLS)
def test_learnable_temperature_is_finite_when_some_rows_are_all_masked(impl):
    queries, passages = correlated(4, 1, 4, dtype=torch.float32)
    ids = FalseNegatives(
        torch.tensor([1, 2, 3, 4], device=device()),
        positive_ids=torch.tensor([[2, 3, 4], [1, 3, 4], [-1, -1, -1], [-1, -1, -1]], device=device()),
    )
    module = InfoNCELoss(0.05, learnable=True, impl=impl).to(device())
    loss = module(queries.requires_grad_(), passages.requires_grad_(), false_negatives=ids)
    loss.backward()
    exact = InfoNCELoss(0.05, learnable=True, impl="reference").to(device(), torch.float64)
    exact.log_temperature.data.copy_(module.log_temperature.data)
    exact(queries.detach().double(), passages.detach().double(), false_negatives=ids).backward()
    assert math.isfinite(module.log_temperature.grad.item())
    rel = 2e-2 if impl == "reference" else 1e-5  # the dense formula loses digits where losses are small
    assert module.log_temperature.grad.item() == pytest.approx(exact.log_temperature.grad.item(), rel=rel)


def test_nan_and_infinity_are_not_hidden():
    queries, passages = correlated(3, 1, 4, dtype=torch.float32)
    passages[1, 2] = math.nan
    for impl in FLOAT32_IMPLS:
        assert math.isnan(info_nce(queries, passages, impl=impl).item())


# ---- memory, and what is wanted


def test_tiled_never_holds_more_exponentials_than_asked(monkeypatch):
    held = []
    original = tiled.exp_scores

    def recording(*args, **kwargs):
        result = original(*args, **kwargs)
        held.append(result[0].numel() * result[0].element_size())
        return result

    monkeypatch.setattr(tiled, "exp_scores", recording)
    queries, passages = (each.requires_grad_() for each in correlated(512, 2, 8, dtype=torch.float32))
    losses = []
    for chunk_mib, fewest in ((0.07, 30), (0.5, 4), (64, 1)):
        held.clear()
        losses.append(info_nce(queries, passages, impl="tiled", chunk_mib=chunk_mib))
        losses[-1].backward()
        assert max(held) <= chunk_mib * 2**20
        assert len(held) >= fewest
        assert sum(held) == 512 * 1024 * 4
    torch.testing.assert_close(losses[0], losses[2])


@pytest.mark.parametrize("wanted", ["queries", "passages", "temperature", "nothing"])
@pytest.mark.parametrize("objective", [None, GTE, Objective(directions=("passage_to_query",), matryoshka_dims=(3,))])
def test_only_the_gradients_that_are_wanted(wanted, objective):
    found = []
    for impl in IMPLS:
        queries, passages = correlated(6, 2, 5)
        leaves = {
            "queries": queries,
            "passages": passages,
            "temperature": torch.tensor(0.3, dtype=torch.float64, device=device()),
        }
        if wanted in leaves:
            leaves[wanted].requires_grad_()
        loss = info_nce(
            queries, passages, temperature=leaves["temperature"], impl=impl, objective=objective, chunk_mib=1e-4
        )
        assert loss.requires_grad == (wanted != "nothing")
        if wanted != "nothing":
            loss.backward()
        found.append([loss.detach()] + [leaf.grad for leaf in leaves.values() if leaf.grad is not None])
    assert len(found[0]) == (1 if wanted == "nothing" else 2)
    torch.testing.assert_close(found[1], found[0])


def test_autocast_changes_nothing():
    queries, passages = correlated(32, 2, 16, dtype=torch.float32)
    for impl in IMPLS:
        plain = info_nce(queries, passages, impl=impl)
        with torch.autocast(device().type, dtype=torch.bfloat16):
            assert torch.equal(info_nce(queries, passages, impl=impl), plain)


def test_backward_twice_and_scaled():
    queries, passages = (each.requires_grad_() for each in correlated(5, 1, 4))
    loss = info_nce(queries, passages, impl="tiled")
    (once,) = torch.autograd.grad(loss, [queries], retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * loss, [queries])
    torch.testing.assert_close(thrice, 3 * once)


def test_any_strides_and_inference_mode():
    queries, passages = correlated(6, 2, 4, dtype=torch.float32)
    expected = info_nce(queries, passages, temperature=0.123, impl="tiled")
    with torch.inference_mode():
        assert torch.equal(info_nce(queries, passages, temperature=0.123, impl="tiled"), expected)
    wide = torch.stack([passages, passages], dim=2)
    turned = queries.T.contiguous().T
    for leaf in (turned, wide):
        leaf.requires_grad_()
    for impl in FLOAT32_IMPLS:
        loss = info_nce(turned, wide[..., 0], temperature=0.123, impl=impl)
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected)
    assert wide.grad is not None


# ---- objectives


@pytest.mark.parametrize("impl", IMPLS)
def test_named_objectives_are_the_published_formulas(impl):
    q, p = correlated(7, 1, 6)
    s = {"qp": q @ p.T / 0.1, "qq": q @ q.T / 0.1, "pp": p @ p.T / 0.1}
    labels = torch.arange(7, device=device())
    others = ~torch.eye(7, dtype=torch.bool, device=device())

    def negatives(name: str) -> Tensor:
        return (s[name].exp() * others).sum(1)

    positive = s["qp"].diagonal()
    clip = (F.cross_entropy(s["qp"], labels) + F.cross_entropy(s["qp"].T, labels)) / 2
    gte_sum = positive.exp() + negatives("qp") + negatives("qq") + negatives("pp") + (s["qp"].T.exp() * others).sum(1)
    qwen_sum = positive.exp() + negatives("qp") + negatives("qq") + negatives("pp")
    for objective, expected in (
        (CLIP, clip),
        (GTE, (gte_sum.log() - positive).mean()),
        (QWEN3_EMBEDDING, (qwen_sum.log() - positive).mean()),
    ):
        torch.testing.assert_close(info_nce(q, p, temperature=0.1, objective=objective, impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_matryoshka_is_the_weighted_sum_over_renormalised_prefixes(impl):
    q, p = correlated(7, 2, 6)
    objective = Objective(matryoshka_dims=(2, 6), matryoshka_weights=(0.3, 1.0))
    short = info_nce(F.normalize(q[:, :2], dim=1), F.normalize(p[:, :2], dim=1), impl=impl)
    expected = 0.3 * short + info_nce(q, p, impl=impl)
    torch.testing.assert_close(info_nce(q, p, objective=objective, impl=impl), expected)


# ---- statistics


@pytest.mark.parametrize("impl", FLOAT32_IMPLS)
def test_stats_count_candidates_masks_and_hits(impl):
    q = torch.eye(4, dtype=torch.float32, device=device())
    p = q[
        [0, 1, 2, 2]
    ].clone()  # row 3's positive is like query 2: some other passage beats it nowhere, ties everywhere
    p[3] = q[0] * 0.5  # now row 3 scores 0 with its positive and 0 with others; row 0 is beaten by nobody
    q[1] = q[0]  # row 1's positive loses to passage 0
    stats = LossStats()
    ids = FalseNegatives(torch.tensor([1, 2, 1, -1], device=device()))  # passages 0 and 2 are one document
    for _ in range(2):
        info_nce(q, p, false_negatives=ids, impl=impl, stats=stats)
    expected = {"candidates": (3 + 4 + 3 + 4) / 4, "masked": 2 / 12, "accuracy": 3 / 4, "mrr": (3 + 1 / 3) / 4}
    assert stats.result() == pytest.approx(expected)
    stats.reset()
    info_nce(q, p, objective=GTE, impl=impl, stats=stats)
    assert stats.result()["candidates"] == 1 + 4 * 3
    with pytest.raises(ValueError, match="collected nothing"):
        LossStats().result()


# ---- the module, and messages


def test_module_holds_the_options():
    queries, passages = correlated(4, 1, 4)
    module = InfoNCELoss(0.1, objective=CLIP, impl="tiled")
    expected = info_nce(queries, passages, temperature=0.1, objective=CLIP)
    assert torch.equal(module(queries, passages), expected)
    assert not list(module.parameters())
    learnable = InfoNCELoss(0.07, learnable=True)
    assert [name for name, _ in learnable.named_parameters()] == ["log_temperature"]
    assert learnable.temperature.item() == pytest.approx(0.07)
    assert "learnable" in repr(learnable)
    assert "temperature=learnable" in repr(learnable.to("meta"))
    for wrong in (0, -1.0, math.inf, math.nan, "0.1"):
        with pytest.raises(ValueError, match="temperature must be a positive number"):
            InfoNCELoss(wrong)


Q, P = torch.zeros(2, 3), torch.zeros(4, 3)
WRONG = [
    ((Q[0], P), {}, r"queries must be a floating-point tensor \[rows, dimension\] of float16, .*, got \(3,\) float32"),
    ((Q, P.long()), {}, "passages must be a floating-point tensor"),
    ((Q, [1]), {}, "passages must be a floating-point tensor.*got list"),
    ((Q, P[:, :2]), {}, r"same dimension, dtype and device, got \(2, 3\) float32"),
    ((Q, P.double()), {}, "same dimension, dtype and device"),
    ((Q, P[:3]), {}, "3 passages cannot be split into equal groups for 2 queries"),
    ((Q, P[:0]), {}, "0 passages cannot be split"),
    ((Q, P), {"positives": torch.tensor([0])}, r"positives must be an int64 tensor \[2\]"),
    ((Q, P), {"positives": torch.tensor([0, -1])}, "from 0 to 3, got values from -1 to 0"),
    ((Q, P), {"positives": torch.tensor([0, 1], dtype=torch.int32)}, "got .* int32"),
    ((Q, P), {"temperature": 0}, "temperature must be positive and finite"),
    ((Q, P), {"temperature": torch.tensor(-1.0)}, "temperature must be positive and finite"),
    ((Q, P), {"temperature": torch.ones(1)}, "0-d floating-point tensor"),
    ((Q, P), {"temperature": math.nan}, "temperature must be positive and finite"),
    ((Q, P), {"false_negatives": FalseNegatives(torch.zeros(4))}, "passage_ids must be an int64.*stable_id"),
    (
        (Q, P),
        {"false_negatives": FalseNegatives(query_ids=torch.tensor([1]))},
        r"query_ids must be an int64 tensor \[2\]",
    ),
    (
        (Q, P),
        {"false_negatives": FalseNegatives(positive_ids=torch.tensor([[1], [2]]))},
        "positive_ids needs passage_ids",
    ),
    ((Q, P), {"false_negatives": FalseNegatives(margin=math.nan)}, "margin must be a finite number"),
    ((Q, P), {"false_negatives": torch.zeros(4)}, r"must be FalseNegatives\(...\)"),
    ((Q, P), {"negatives": "all"}, '"gather", "ring" or "local", got'),
    ((Q, P), {"impl": "magic"}, "impl must be"),
    ((Q, P), {"chunk_mib": 0}, "chunk_mib must be a positive number"),
    ((Q, P), {"objective": "clip"}, r"objective must be an Objective\(...\)"),
    ((Q, P), {"objective": Objective(matryoshka_dims=(4,))}, "must not exceed the embeddings' dimension 3"),
    ((Q, P), {"stats": {}}, r"stats must be a LossStats\(\)"),
    ((Q[:0], P), {}, "no queries on any rank"),
]


@pytest.mark.parametrize(("inputs", "options", "message"), WRONG)
def test_wrong_arguments_are_explained(inputs, options, message):
    with pytest.raises(ValueError, match=message):
        info_nce(*inputs, **options)


def test_wrong_objectives_are_explained():
    for options, message in (
        ({"directions": ()}, "directions must be"),
        ({"directions": ("query_to_passage", "query_to_passage")}, "directions must be different"),
        ({"directions": ("query_to_doc",)}, "query_to_passage"),
        ({"partition": "each"}, "partition must be"),
        ({"matryoshka_dims": (4, 4)}, "different positive integers"),
        ({"matryoshka_dims": (0,)}, "different positive integers"),
        ({"matryoshka_weights": (1.0,)}, "one finite number for each"),
        ({"directions": {"query_to_passage", "passage_to_query"}}, "directions must be a tuple or a list, got set"),
        ({"directions": None}, "directions must be a tuple or a list, got NoneType"),
        ({"directions": (["query_to_passage"],)}, "directions must be different ones"),
        ({"matryoshka_dims": {4, 8}}, "matryoshka_dims must be a tuple or a list, got set"),
        ({"matryoshka_dims": (4, True)}, "different positive integers"),
        ({"matryoshka_dims": (4,), "matryoshka_weights": {1.0}}, "matryoshka_weights must be a tuple or a list"),
        ({"matryoshka_dims": (4,), "matryoshka_weights": (None,)}, "one finite number for each"),
        ({"matryoshka_dims": (4,), "matryoshka_weights": ("1",)}, "one finite number for each"),
    ):
        with pytest.raises(ValueError, match=message):
            Objective(**options)


@pytest.mark.parametrize("impl", ["tiled", "reference"])
def test_second_derivatives_are_right_or_refused(impl):
    queries, passages = (torch.randn(n, 8, dtype=torch.float64).requires_grad_() for n in (4, 8))
    loss = info_nce(queries, passages, temperature=0.5, impl=impl)
    if impl == "tiled":
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(loss, queries, create_graph=True)
    else:
        (first,) = torch.autograd.grad(loss, queries, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), queries)
        assert second.abs().max() > 0


def test_the_loss_inside_a_checkpoint():
    queries, passages = (torch.randn(n, 8).requires_grad_() for n in (4, 8))
    info_nce(queries, passages).backward()
    expected = queries.grad.clone()
    queries.grad = None
    torch.utils.checkpoint.checkpoint(info_nce, queries, passages, use_reentrant=False).backward()
    assert torch.equal(queries.grad, expected)


def test_without_grad_mode_no_gradient_is_made():
    queries, passages = (torch.randn(n, 8).requires_grad_() for n in (4, 8))
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda _: pytest.fail("saved"), lambda x: x):
        loss = info_nce(queries, passages)
    assert loss.grad_fn is None
    assert loss.item() == pytest.approx(info_nce(queries, passages).item())


@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_fake_tensors_leave_nothing_behind(impl):
    """What is kept from call to call must not be kept from a call that only traces."""
    queries, passages = torch.randn(5, 8), torch.randn(15, 8)
    expected = F.cross_entropy(queries @ passages.T / 0.7, torch.arange(5) * 3)
    with FakeTensorMode(), suppress(DynamicOutputShapeException):
        info_nce(torch.randn(5, 8), torch.randn(15, 8), temperature=0.7, impl=impl)
    found = info_nce(queries, passages, temperature=0.7, impl=impl)
    assert not isinstance(found, FakeTensor)
    torch.testing.assert_close(found, expected)


def test_an_objective_takes_lists_and_refuses_fractions():
    objective = Objective(directions=["query_to_passage"], matryoshka_dims=[4, 8])
    queries, passages = torch.randn(4, 8), torch.randn(8, 8)
    assert info_nce(queries, passages, objective=objective).isfinite()
    with pytest.raises(ValueError, match="positive integers"):
        Objective(matryoshka_dims=(4.0,))


@pytest.mark.parametrize("mode", ["in_batch_negatives", "hard_negatives", "all_negatives"])
@pytest.mark.parametrize("directions", [("query_to_passage",), ("query_to_passage", "query_to_query")])
def test_hardness_is_that_of_sentence_transformers(mode, directions):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    generator = torch.Generator().manual_seed(5)
    columns = [torch.randn(7, 8, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(4)]
    theirs = losses.MultipleNegativesRankingLoss(
        None,
        scale=4.0,
        similarity_fct=lambda a, b: a @ b.T,
        directions=tuple(name.replace("passage", "doc") for name in directions),
        hardness_mode=mode,
        hardness_strength=0.7,
    ).compute_loss_from_embeddings(columns, None)
    expected = gradients_of(theirs, *columns)
    passages = torch.stack(columns[1:], 1).reshape(-1, 8)
    objective = Objective(directions=directions, hardness_mode=mode, hardness_strength=0.7)
    for impl in IMPLS:
        ours = info_nce(columns[0], passages, temperature=0.25, impl=impl, objective=objective)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(gradients_of(ours, *columns), expected)
    for wrong in ({"hardness_mode": "hard"}, {"hardness_mode": mode}, {"hardness_strength": 1.0}):
        with pytest.raises(ValueError, match="hardness_"):
            Objective(**wrong)
    with pytest.raises(ValueError, match="query_to_passage"):
        Objective(directions=("passage_to_query",), hardness_mode=mode, hardness_strength=1.0)


def test_a_temperature_of_numpy_is_a_float():
    queries, passages = torch.randn(4, 8), torch.randn(8, 8)
    expected = info_nce(queries, passages, temperature=0.25)
    assert torch.equal(info_nce(queries, passages, temperature=np.float32(0.25)), expected)
    assert torch.equal(InfoNCELoss(np.float32(0.25))(queries, passages), expected)


@pytest.mark.parametrize("option", ["negatives", "impl"])
def test_the_module_refuses_unknown_options_when_it_is_made(option):
    with pytest.raises(ValueError, match=f'{option} must be ".* or ".*", got \'x\''):
        InfoNCELoss(**{option: "x"})


def test_a_temperature_whose_inverse_overflows_is_refused():
    rows = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"temperature must be positive and finite .*got 1e-40"):
        info_nce(rows, rows, temperature=1e-40)
