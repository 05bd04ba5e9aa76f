"""GradCache.loss: to autograd and to trainers an ordinary loss, whatever is done with it before and in backward."""

import gc
import weakref
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from inbatch.grad_cache import GradCache
from tests.grad_cache.test_step import (
    BUDGET,
    NO_LIMIT_MIB,
    Tower,
    assert_equal,
    build,
    cross_entropy,
    distributed_loss,
    global_batches,
    random_batch,
    rows_of,
    step_gradients,
    take_gradients,
)
from tests.helpers import device


@pytest.fixture
def batches():
    return random_batch(9, 8, seed=1), random_batch(9, 16, seed=2)


def plain_gradients(tower, batches, scale=1.0) -> dict:
    (scale * cross_entropy(tower(batches[0]), tower(batches[1]))).backward()
    return take_gradients([tower])


@pytest.mark.parametrize("keep", [0, 1, NO_LIMIT_MIB])
def test_its_backward_is_the_call_with_dropout_and_all(batches, keep):
    tower = Tower()
    value, expected = step_gradients([tower], batches=batches, keep_graph_mib=keep)
    generator = torch.get_rng_state()
    torch.manual_seed(7)
    loss = GradCache(tower, cross_entropy, micro_batch_tokens=BUDGET, keep_graph_mib=keep).loss(*batches)
    torch.rand(3)  # what the trainer draws between the passes shifts nothing
    loss.backward()
    assert torch.equal(loss, value)
    torch.manual_seed(7)
    assert_equal(take_gradients([tower]), expected, tolerance=1e-6)
    step_gradients([tower], batches=batches, keep_graph_mib=keep)
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("encode", ["module", "lambda"])
def test_what_autograd_may_do_with_a_loss(batches, encode):
    tower = Tower(dropout=0.0)
    plain = plain_gradients(tower, batches)
    step = GradCache(
        tower if encode == "module" else lambda batch: tower(batch), cross_entropy, micro_batch_tokens=BUDGET
    )

    def times(factor):
        return {name: factor * grad for name, grad in plain.items()}

    for loss in (step.loss(*batches) / 4 for _ in range(2)):  # a trainer's accumulation
        loss.backward()
    assert_equal(take_gradients([tower]), times(0.5))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(step.loss(*batches)).backward()
    assert_equal(take_gradients([tower]), times(1024))
    (step.loss(*batches) + 2 * step.loss(*batches)).backward()
    assert_equal(take_gradients([tower]), times(3))
    loss = step.loss(*batches)
    loss.backward(retain_graph=True)
    loss.backward()
    assert_equal(take_gradients([tower]), times(2))
    parameters = dict(tower.named_parameters())
    found = torch.autograd.grad(step.loss(*batches), parameters.values())
    assert_equal({f"0.{name}": grad for name, grad in zip(parameters, found, strict=True)}, plain)
    seen = []
    for parameter in tower.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter))
    step.loss(*batches).backward()
    assert len(seen) == len(parameters)  # an optimizer in the backward steps once
    take_gradients([tower])
    first = next(iter(parameters.values()))
    (step.loss(*batches) + first.square().sum()).backward()
    name = f"0.{next(iter(parameters))}"
    assert_equal(take_gradients([tower]), {**plain, name: plain[name] + 2 * first.detach()})


def test_a_parameter_that_only_some_micro_batches_use(batches):
    """As an expert: the first micro-batch, the only one with a graph at hand, does not show it."""
    tower, rare = Tower(dropout=0.0), nn.Parameter(torch.ones(32))

    def encode(batch):
        return tower(batch) * (rare if batch["input_ids"].shape[1] <= 8 else 1.0)

    def plain():
        parts = [[encode(rows_of(batch, i, i + 1)) for i in range(9)] for batch in narrowed]
        return cross_entropy(*(torch.cat(part) for part in parts))

    lengths = [batch["attention_mask"].sum(1) for batch in batches]
    narrowed = [batches[0], {name: value.clone() for name, value in batches[1].items()}]
    narrowed[1]["attention_mask"][0] = 1  # the longest, alone in the first micro-batch, does not use it
    assert max(map(int, lengths[0])) <= 8
    loss = GradCache(encode, cross_entropy, micro_batch_tokens=16, keep_graph_mib=0).loss(*narrowed)
    rare.grad = torch.ones(32)
    loss.backward()
    found, rare.grad = rare.grad, None
    assert (found != 1).any()
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_it_is_the_loss_alone(batches, mode):
    tower = Tower(dropout=0.0)
    step = GradCache(tower, cross_entropy, micro_batch_tokens=BUDGET)
    expected = cross_entropy(tower(batches[0]), tower(batches[1]))
    with mode():
        loss = step.loss(*batches)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())
    with torch.no_grad():
        torch.testing.assert_close(step(*batches), expected.detach())
    assert not take_gradients([tower])
    assert_equal(step_gradients([tower], batches=batches)[1], plain_gradients(tower, batches))


def test_autocast_of_the_first_pass_holds_in_the_backward(batches):
    tower = Tower(checkpointing=True)
    found = []
    for keep in (NO_LIMIT_MIB, 0):
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16):
            loss = GradCache(tower, cross_entropy, micro_batch_tokens=BUDGET, keep_graph_mib=keep).loss(*batches)
        loss.backward()
        found.append(take_gradients([tower]))
    assert_equal(*found)


def test_a_loss_that_is_dropped_leaves_nothing(batches):
    tower = Tower()
    graphs = []

    def encode(batch):
        output = tower(batch)
        if output.requires_grad:
            graphs.append(weakref.ref(output.grad_fn.metadata.setdefault("kept", Marker())))
        return output

    step = GradCache(encode, cross_entropy, micro_batch_tokens=BUDGET)
    step.loss(*batches)
    gc.collect()
    assert graphs
    assert not any(graph() for graph in graphs)
    assert not take_gradients([tower])


class Marker:
    """Lives as long as the node of a graph that it hangs on."""


# ---- arguments of the loss, and what a batch and an embedding may be


def test_keyword_arguments_reach_the_loss(batches):
    tower = Tower(dropout=0.0)

    def loss(queries_BD, passages_BD, weight, plus=0.0):
        return weight * cross_entropy(queries_BD, passages_BD) + plus

    step = GradCache(tower, loss, micro_batch_tokens=BUDGET)
    plain = plain_gradients(tower, batches, 3.0)
    value = step(*batches, loss_kwargs={"weight": 3.0})
    assert_equal(take_gradients([tower]), plain)
    deferred = step.loss(*batches, loss_kwargs={"weight": 3.0, "plus": 1.0})
    deferred.backward()
    assert_equal(take_gradients([tower]), plain)
    torch.testing.assert_close(deferred.detach(), value + 1)


def test_numbers_and_strings_reach_encode_and_rows_that_differ_in_them_are_not_mixed(batches):
    tower, seen = Tower(dropout=0.0), set()

    def encode(batch):
        seen.add((batch["prompt_length"], batch["task"]))
        tokens = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
        return tower(tokens) * batch["prompt_length"]

    tasks = [{**batch, "prompt_length": length, "task": None} for batch, length in zip(batches, (2, 3), strict=True)]
    cross_entropy(2 * tower(batches[0]), 3 * tower(batches[1])).backward()
    expected = take_gradients([tower])
    assert_equal(step_gradients([tower], batches=tasks, encode=encode, keep_graph_mib=0)[1], expected)
    assert seen == {(2, None), (3, None)}


def test_batches_without_a_mask():
    torch.manual_seed(0)
    features = [{"pixels": torch.randn(6, 3, 20, 20), "label": torch.arange(6)} for _ in range(2)]
    model, sizes = nn.Sequential(nn.Flatten(), nn.Linear(1200, 8)), []

    def encode(batch):
        sizes.append(len(batch["pixels"]))
        return model(batch["pixels"]) + batch["label"][:, None]

    cross_entropy(*(encode(batch) for batch in features)).backward()
    expected = take_gradients([model])
    sizes.clear()
    assert_equal(
        step_gradients([model], batches=features, encode=encode, micro_batch_tokens=4, keep_graph_mib=0)[1], expected
    )
    assert set(sizes) == {4}  # 1200 numbers count as one token
    ids = {"input_ids": torch.randint(1, 9, (5, 6))}
    embedding = nn.Embedding(9, 8)
    step_gradients([embedding], batches=[ids, ids], encode=lambda batch: embedding(batch["input_ids"]).mean(1))


@pytest.mark.parametrize("side", ["right", "left"])
def test_token_embeddings_of_any_width(batches, side):
    """Late interaction: [b, T, D] with T as wide as the micro-batch; zeros fill up, so a mask can be read from them."""
    tower = Tower(dropout=0.0)
    if side == "left":
        batches = [{name: value.flip(1) for name, value in batch.items()} for batch in batches]
    widths = set()

    def encode(batch):
        states_BTD = tower.backbone(**batch).last_hidden_state
        widths.add(states_BTD.shape[1])
        return nn.functional.normalize(states_BTD, dim=-1) * batch["attention_mask"][..., None]

    def max_sim(queries_BTD, passages_BTD):
        scores = torch.einsum("bqd,npd->bnqp", queries_BTD, passages_BTD)
        scores = scores.masked_fill(~passages_BTD.any(-1)[None, :, None], -2.0).amax(-1)
        scores = (scores * queries_BTD.any(-1)[:, None]).sum(-1)
        return nn.functional.cross_entropy(scores, torch.arange(len(scores)))

    for batch in batches:
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    max_sim(*(encode(batch) for batch in batches)).backward()
    expected = take_gradients([tower])
    widths.clear()
    for keep in (0, NO_LIMIT_MIB):
        options = {"encode": encode, "loss": max_sim, "batches": batches, "keep_graph_mib": keep, "width_multiple": 1}
        assert_equal(step_gradients([tower], **options)[1], expected)
    assert len(widths) > 2


# ---- several processes


class Outer(nn.Module):
    """As a trainer's module that holds the encoder and computes the loss in its own forward."""

    def __init__(self, tower):
        super().__init__()
        self.tower = tower
        self.step = GradCache(tower, distributed_loss, micro_batch_tokens=BUDGET, keep_graph_mib=0)

    def forward(self, queries, passages):
        return self.step.loss(queries, passages)


def check_ddp(rank: int, sizes: list[int]):
    whole, local = global_batches(rank, sizes)
    plain = Tower(dropout=0.0).to(device())
    cross_entropy(plain(whole[0]), plain(whole[1])).backward()
    expected = take_gradients([plain])

    def made(find_unused=False, bucket_view=False):
        return DistributedDataParallel(
            Tower(dropout=0.0).to(device()),
            bucket_cap_mb=0.01,
            find_unused_parameters=find_unused,
            gradient_as_bucket_view=bucket_view,
        )

    for find_unused, bucket_view in ((False, False), (True, True)):
        ddp = made(find_unused, bucket_view)
        outer = DistributedDataParallel(
            Outer(Tower(dropout=0.0).to(device())),
            find_unused_parameters=find_unused,
            gradient_as_bucket_view=bucket_view,
            bucket_cap_mb=0.01,
        )
        ways = {
            "found": GradCache(ddp, distributed_loss, micro_batch_tokens=BUDGET).loss,
            "given": GradCache(lambda batch, ddp=ddp: ddp(batch), distributed_loss, modules=[ddp]).loss,
            "around": GradCache(lambda batch, ddp=ddp: ddp.module(batch), distributed_loss, modules=[ddp]).loss,
            "outer": outer,
        }
        for name, loss in ways.items():
            note, module = (name, find_unused, bucket_view), outer if name == "outer" else ddp
            loss(*local).backward()
            assert_equal(renamed(take_gradients([module])), expected, note)
            with module.no_sync():
                (loss(*local) / 2).backward()
            (loss(*local) / 2).backward()
            assert_equal(renamed(take_gradients([module])), expected, note)
            with torch.no_grad():
                loss(*local)
            if name != "outer":  # two forward passes of an outer module: DDP writes to its buffers in between
                (loss(*local) + loss(*local)).backward()
                twice = {key: 2 * grad for key, grad in expected.items()}
                assert_equal(renamed(take_gradients([module])), twice, note)


def renamed(gradients: dict) -> dict:
    return {name.replace("0.tower.", "0."): grad for name, grad in gradients.items()}


@pytest.mark.parametrize("sizes", [[4, 3], [3, 0, 4]], ids=str)
def test_under_ddp_it_is_the_gradient_of_one_process(pool, sizes):
    pool.run(check_ddp, len(sizes), sizes, timeout_s=120)


def check_other_terms(rank: int):
    """Another loss through the same DDP module, before or after; and a communication hook."""
    whole, local = global_batches(rank, [4, 4])
    plain = Tower(dropout=0.0).to(device())
    cross_entropy(plain(whole[0]), plain(whole[1])).backward()
    plain(whole[0])[:, 0].mean().backward()
    expected = take_gradients([plain])
    ddp, seen = DistributedDataParallel(Tower(dropout=0.0).to(device()), bucket_cap_mb=0.01), []

    def hook(state, bucket):
        seen.append(bucket.index())
        return allreduce_hook(state, bucket)

    ddp.register_comm_hook(None, hook)
    step = GradCache(ddp, distributed_loss, micro_batch_tokens=BUDGET, keep_graph_mib=0)

    def other():
        return ddp(local[0])[:, 0].mean()

    for terms in ([other, lambda: step.loss(*local)], [lambda: step.loss(*local), other]):
        for _ in range(2):
            seen.clear()
            sum(term() for term in terms).backward()
            assert_equal(take_gradients([ddp]), expected)
            assert sorted(seen) == sorted(set(seen)) != []  # every bucket once


def test_other_losses_and_communication_hooks(pool):
    pool.run(check_other_terms, 2)


def check_fsdp2(rank: int, sizes: list[int]):
    whole, local = global_batches(rank, sizes)
    for towers in ("shared", "separate"):
        wrapped, plain, options = build("fsdp2", towers, dropout=0.0)
        cross_entropy(plain[0](whole[0]), plain[-1](whole[1])).backward()
        expected = take_gradients(plain)
        for keep in (0, NO_LIMIT_MIB):
            step = GradCache(micro_batch_tokens=BUDGET, keep_graph_mib=keep, reshard=keep == 0, **options)
            for _ in range(2):
                (step.loss(*local) / 2).backward()
            assert_equal(take_gradients(wrapped), expected, (towers, keep))


@pytest.mark.parametrize("sizes", [[4, 3], [3, 0, 4]], ids=str)
def test_under_fsdp2_it_is_the_gradient_of_one_process(pool, sizes):
    pool.run(check_fsdp2, len(sizes), sizes)


def check_nobody_reduces(rank: int):
    _, local = global_batches(rank, [4, 3])
    tower = Tower(dropout=0.0).to(device())
    ddp = DistributedDataParallel(Tower(dropout=0.0).to(device()))
    for encode in (tower, lambda batch: tower(batch), [ddp, tower]):
        step = GradCache(encode, distributed_loss, micro_batch_tokens=BUDGET)
        for run in (step, step.loss, step):
            with pytest.raises(
                ValueError, match=r"2 processes train \d+ parameters .* give modules=\[ddp\].* reduce=Fal"
            ):
                run(*local)
            assert not take_gradients([tower, ddp])
        step(*local, reduce=False)
        step.loss(*local, reduce=False).backward()
        assert take_gradients([tower])
        with pytest.raises(ValueError, match="2 processes train"):
            step(*local)
        take_gradients([ddp])
    scale = nn.Parameter(torch.ones((), device=device()))
    step = GradCache(tower.requires_grad_(False), lambda q, p: scale * distributed_loss(q, p))
    step(*local)  # no encoder trains, so no module is missed


def test_parameters_that_nobody_reduces_are_named_in_the_first_step(pool):
    pool.run(check_nobody_reduces, 2)


def check_fsdp1(rank: int):
    _, local = global_batches(rank, [6, 1])
    sharded = FullyShardedDataParallel(Tower(dropout=0.0).to(device()), device_id=torch.device(device().type))
    inside = nn.Sequential(sharded)
    for encode in (sharded, inside, inside.forward):
        with pytest.raises(ValueError, match=r"FullyShardedDataParallel \(FSDP1\), which is not supported"):
            GradCache(encode, distributed_loss)
    with pytest.raises(ValueError, match=r"\(FSDP1\)"):
        GradCache(lambda batch: sharded(batch), distributed_loss, modules=[sharded])
    for reduce in (True, False):
        with pytest.raises(ValueError, match=r"encode runs through is FullyShardedDataParallel \(FSDP1\)"):
            GradCache(lambda batch: inside(batch), distributed_loss, micro_batch_tokens=BUDGET)(*local, reduce=reduce)


def test_fsdp1_is_refused_wherever_it_hides(pool):
    pool.run(check_fsdp1, 2)


def check_forward_replaced(rank: int):
    """A forward that somebody put on the module itself, as accelerate does, is there after the step."""
    _, local = global_batches(rank, [3, 2])
    for kind in ("ddp", "fsdp2"):
        (wrapped,), _, options = build(kind, "shared", dropout=0.0)
        wrapped.forward = replaced = mock.Mock(side_effect=wrapped.forward)
        step = GradCache(micro_batch_tokens=BUDGET, **options)
        step(*local)
        step.loss(*local).backward()
        assert wrapped.forward is replaced
        if kind == "fsdp2":
            assert replaced.called


def test_a_replaced_forward_is_put_back(pool):
    pool.run(check_forward_replaced, 2)
