"""What GradCache refuses: DDP and FSDP2 modules that it was not told of, whose gradients would be wrong without a word,
and arguments that it could not use.
"""

import itertools
from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from inbatch.grad_cache import GradCache
from inbatch.grad_cache.memory import Trial
from inbatch.grad_cache.passes import Passes
from tests.grad_cache.test_step import (
    BUDGET,
    NO_LIMIT_MIB,
    Tower,
    assert_equal,
    build,
    count_collectives,
    cross_entropy,
    distributed_loss,
    global_batches,
    random_batch,
    step_gradients,
)

NAMES = {"ddp": r"DistributedDataParallel\(Tower\)", "fsdp2": "FSDPTower"}
refusal = partial(pytest.raises, ValueError)


def hidden(encode) -> list:
    """The same encoder as GradCache cannot see through it."""
    return [lambda batch: encode(batch), partial(encode)]


def nothing_is_left_on_the_classes() -> bool:
    return not any("__call__" in vars(wrapper) for wrapper in (DistributedDataParallel, FSDPModule))


def check_hidden(rank: int, kind: str):
    _, local = global_batches(rank, [6, 1])  # the ranks hold unequally many micro-batches
    wrapped, _, options = build(kind, "separate", dropout=0.0)
    known = {"max_over_ranks": options.pop("max_over_ranks")} if kind == "fsdp2" else {}
    _, expected = step_gradients(wrapped, batches=local, **{**options, **known})
    for encode, tokens in itertools.product(hidden(wrapped[0]), (None, BUDGET, "auto")):
        step = GradCache(encode, distributed_loss, micro_batch_tokens=tokens)

        def refused(step=step):
            for _ in range(2):  # a step that was refused does not count as the first
                with refusal(match=f"encode runs through {NAMES[kind]}, which is not in modules.* give modules="):
                    step(*local)

        assert not count_collectives(refused)
        assert nothing_is_left_on_the_classes()
    both = [hidden(tower)[0] for tower in wrapped]
    with refusal(match=NAMES[kind]):  # one of the two is known
        step_gradients(wrapped, batches=local, **{**options, **known, "encode": [wrapped[0], both[1]]})
    _, actual = step_gradients(wrapped, batches=local, modules=wrapped, **{**options, **known, "encode": both})
    assert_equal(actual, expected, kind)
    assert nothing_is_left_on_the_classes()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_module_that_an_encode_hides_is_refused_on_every_rank(pool, kind):
    pool.run(check_hidden, 2, kind)


def check_probe(rank: int, kind: str):
    """The search for a token budget encodes before the first pass; without a GPU its memory figures are made up."""
    _, local = global_batches(rank, [2, 2])
    wrapped, _, _ = build(kind, "shared")
    figures = {"on_cuda": lambda: True, "free_bytes": lambda modules, device: 1 << 30}

    def trial(run: Callable[[], None], tokens: int) -> Trial:
        run()
        return Trial(tokens, 1.0, 1)

    step = GradCache(hidden(wrapped[0])[0], distributed_loss)
    with (
        mock.patch.multiple("inbatch.grad_cache.passes", timed_trial=trial, **figures),
        mock.patch.object(Passes, "_encode_all", side_effect=AssertionError("the probe let it through")),
        refusal(match=NAMES[kind]),
    ):
        step(*local)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_the_search_for_a_budget_refuses_a_hidden_module(pool, kind):
    pool.run(check_probe, 1, kind)


def check_no_recompilation(rank: int, kind: str):
    _, local = global_batches(rank, [4])
    wrapped, _, options = build(kind, "shared")
    counter = CompileCounter()
    torch._dynamo.reset()
    for layer in getattr(wrapped[0], "module", wrapped[0]).layers:
        layer.forward = torch.compile(layer.forward, backend=counter, dynamic=True)
    step = GradCache(keep_graph_mib=NO_LIMIT_MIB, micro_batch_tokens=BUDGET, **options)
    step(*local)
    compiled = counter.frame_count
    assert compiled > 0
    with mock.patch("inbatch.grad_cache.step.others_refused", side_effect=AssertionError("only the first step checks")):
        step(*local)
    assert counter.frame_count == compiled
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_the_check_ends_with_the_first_step_and_compiles_nothing_again(pool, kind):
    pool.run(check_no_recompilation, 1, kind)


class ScaledLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, queries_BD, passages_BD):
        return self.scale * distributed_loss(queries_BD, passages_BD)


def check_loss(rank: int):
    """A loss that is DDP runs once a step and reduces its own parameters."""
    _, local = global_batches(rank, [4, 2])
    wrapped, _, options = build("ddp", "shared", dropout=0.0)
    device = local[0]["input_ids"].device
    _, expected = step_gradients(wrapped, batches=local, **options)
    loss = DistributedDataParallel(ScaledLoss().to(device))
    _, actual = step_gradients(wrapped, batches=local, **{**options, "loss": loss})
    assert_equal(actual, expected)
    assert loss.module.scale.grad is not None


def test_a_loss_may_be_ddp(pool):
    pool.run(check_loss, 2)


# ---- arguments


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((None, cross_entropy), {}, "encode must be a callable, or a sequence .* got NoneType"),
        (("encode", cross_entropy), {}, "encode must be a callable, or a sequence .* got str"),
        (([cross_entropy, 3], cross_entropy), {}, "encode must hold callables only, got int at place 1"),
        ((nn.Identity(), None), {}, "loss must be a callable .* got NoneType; for example lambda q, p"),
        ((nn.Identity(), cross_entropy), {"modules": nn.Identity()}, r"got Identity; write modules=\[module\]"),
        ((nn.Identity(), cross_entropy), {"modules": nn.Sequential()}, r"got Sequential; write modules=\[module\]"),
        ((nn.Identity(), cross_entropy), {"modules": None}, "modules must be a sequence .* got NoneType"),
        ((nn.Identity(), cross_entropy), {"modules": [3]}, "modules takes .* got int"),
        ((nn.Identity(), cross_entropy), {"modules": [[3]]}, "modules takes .* got list"),
    ],
)
def test_the_constructor_says_what_it_cannot_use(arguments, options, message):
    with refusal(match=message):
        GradCache(*arguments, **options)


def test_a_batch_with_a_value_that_is_no_tensor_is_told_by_its_key():
    batch = random_batch(2, 8, seed=1)
    with refusal(match="batch 1 must be a mapping of tensors, got list for 'text'; leave it out"):
        GradCache(Tower(), cross_entropy)(batch, {**batch, "text": ["a", "b"]})


def test_inference_mode_is_named():
    batch = random_batch(2, 8, seed=1)
    step = GradCache(Tower(), cross_entropy)
    with torch.inference_mode(), refusal(match=r"under torch.inference_mode\(\); call the step outside"):
        step(batch, batch)
    with torch.no_grad():  # which a step can undo
        assert torch.isfinite(step(batch, batch))
