"""GradCache: the plain step's gradient, once, however the batch is cut; in one process and over DDP and FSDP2."""

import itertools
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel

from inbatch import collectives
from inbatch.grad_cache import GradCache
from inbatch.grad_cache.micro_batches import cut, placeholder, take
from inbatch.losses import info_nce
from tests.helpers import device

BUDGET = 32  # tokens of a micro-batch: a few rows of the test batches
NO_LIMIT_MIB = 1 << 20


class Tower(nn.Module):
    def __init__(self, *, seed=0, lora=False, checkpointing=False, frozen=False, dropout=0.1):
        super().__init__()
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=40,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            initializer_range=0.3,
        )
        self.backbone = BertModel(config, add_pooling_layer=False)
        self.layers = self.backbone.encoder.layer
        if lora:
            options = {"target_modules": ["query", "value"], "init_lora_weights": False, "lora_dropout": dropout}
            self.backbone = get_peft_model(self.backbone, LoraConfig(r=2, **options))
        if checkpointing:
            self.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if frozen:
            self.requires_grad_(False)
        self.train()

    def forward(self, batch):
        states_BTD = self.backbone(**batch).last_hidden_state
        mask_BT1 = batch["attention_mask"][..., None].to(states_BTD)
        return F.normalize((states_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1), dim=-1)

    def embed(self, batch):
        return self(batch)


def random_batch(rows: int, width: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths_B = torch.randint(1, width + 1, (rows,), generator=generator)
    mask_BT = (torch.arange(width) < lengths_B[:, None]).long()
    ids_BT = torch.randint(1, 40, (rows, width), generator=generator) * mask_BT
    return {name: value.to(device()) for name, value in (("input_ids", ids_BT), ("attention_mask", mask_BT))}


def rows_of(batch: dict, start: int, stop: int) -> dict:
    return {name: value[start:stop] for name, value in batch.items()}


def cross_entropy(queries_BD: Tensor, passages_BD: Tensor) -> Tensor:
    return F.cross_entropy(queries_BD @ passages_BD.T / 0.05, torch.arange(len(queries_BD), device=queries_BD.device))


def distributed_loss(queries_BD: Tensor, passages_BD: Tensor) -> Tensor:
    return info_nce(queries_BD, passages_BD, temperature=0.05)


def largest(value: int) -> int:
    return int(collectives.all_reduce(torch.tensor(value, device=device()), "max"))


def take_gradients(modules) -> dict[str, Tensor]:
    """Gradients by name, whole where FSDP2 shards them; they are removed from the parameters."""
    found = {}
    for number, module in enumerate(modules):
        for name, parameter in module.named_parameters():
            grad, parameter.grad = parameter.grad, None
            if grad is not None:
                found[f"{number}.{name.removeprefix('module.')}"] = getattr(
                    grad, "full_tensor", lambda grad=grad: grad
                )()
    return found


def assert_equal(actual: dict, expected: dict, note: object = "", tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys(), note
    assert expected, note
    scale = max(grad.abs().max() for grad in expected.values())
    for name, grad in expected.items():
        assert (actual[name] - grad).abs().max() <= tolerance * scale, (note, name)


def step_gradients(towers, seed=7, batches=(), **options) -> tuple[Tensor, dict]:
    encode = options.pop("encode", None) or towers[0]
    loss = options.pop("loss", cross_entropy)
    torch.manual_seed(seed)
    value = GradCache(encode, loss, **{"micro_batch_tokens": BUDGET, **options})(*batches)
    return value, take_gradients(towers)


# ---- one process


@pytest.fixture
def batches():
    return random_batch(9, 8, seed=1), random_batch(9, 16, seed=2)


def test_equals_the_plain_step_for_every_cut(batches):
    tower = Tower(dropout=0.0)
    cross_entropy(tower(batches[0]), tower(batches[1])).backward()
    plain = take_gradients([tower])
    for tokens, keep in itertools.product((1, 20, 64, None, "auto"), (0, "auto")):
        options = {"micro_batch_tokens": tokens, "keep_graph_mib": keep}
        assert_equal(step_gradients([tower], batches=batches, **options)[1], plain, options)


def test_dropout_replays_bit_for_bit_and_leaves_the_generator_alike(batches):
    tower = Tower()
    seen = []
    for keep in (0, 1, NO_LIMIT_MIB):
        loss, gradients = step_gradients([tower], batches=batches, keep_graph_mib=keep)
        seen.append((loss, torch.get_rng_state(), *gradients.values()))
    for others in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], others, strict=True))


def test_uncut_is_the_plain_step_with_dropout(batches):
    batches[0]["attention_mask"][0] = batches[1]["attention_mask"][0] = 1  # nothing to trim
    tower = Tower()
    torch.manual_seed(7)
    cross_entropy(tower(batches[0]), tower(batches[1])).backward()
    assert_equal(take_gradients([tower]), step_gradients([tower], batches=batches, micro_batch_tokens=None)[1])


@pytest.mark.parametrize("outside", [True, False])
def test_autocast(batches, outside):
    tower = Tower(checkpointing=True)

    def encode(batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=not outside):
            return tower(batch).float()

    found = []
    for keep in (NO_LIMIT_MIB, 0):
        with torch.autocast("cpu", torch.bfloat16, enabled=outside):
            _, gradients = step_gradients([tower], encode=encode, batches=batches, keep_graph_mib=keep)
        found.append(gradients)
    assert_equal(found[0], found[1])
    assert len(found[0]) == len(list(tower.parameters()))


def bytes_left_behind(step, batches, kind: str) -> int:
    """What a step allocated and did not free, by torch's own books."""
    if kind == "cuda":
        before = torch.cuda.memory_allocated()
        step(*batches)
        return torch.cuda.memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(*batches)
    return sum(event.self_cpu_memory_usage for event in profile.key_averages())


@pytest.mark.parametrize("keep", [0, "auto"])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_step_leaves_no_memory_behind(batches, keep, kind):
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    tower = Tower().to(kind)
    batches = [{name: value.to(kind) for name, value in batch.items()} for batch in batches]
    step = GradCache(tower, cross_entropy, micro_batch_tokens=BUDGET, keep_graph_mib=keep)
    step(*batches)  # which makes the gradients
    assert [bytes_left_behind(step, batches, kind) for _ in range(3)] == [0, 0, 0]


def measured_twice() -> int:
    """How often a step on the CPU encodes its first micro-batch more: once where the process uses a GPU elsewhere."""
    return int(torch.cuda.is_initialized())


class WeightCasts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("keep", "passes"), [(NO_LIMIT_MIB, 1), (0, 3)])  # with a graph, without, and again with one
def test_autocast_casts_a_weight_once_a_pass(batches, keep, passes):
    tower = Tower()

    def encode(batch, cache=True):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            return tower(batch).float()

    options = {"batches": batches, "keep_graph_mib": keep}
    _, expected = step_gradients([tower], encode=lambda batch: encode(batch, cache=False), **options)
    with WeightCasts() as once:
        encode(batches[0])
    assert once.count > 20
    with WeightCasts() as all_passes:
        _, gradients = step_gradients([tower], encode=encode, **options)
    assert all_passes.count == passes * once.count
    assert_equal(gradients, expected, tolerance=0)


def test_encodes_twice_only_what_is_not_kept_and_calls_the_loss_once(batches):
    tower, calls = Tower(), Counter()

    def encode(batch):
        calls["encode"] += 1
        return tower(batch)

    def loss(queries_BD, passages_BD):
        calls["loss"] += 1
        return cross_entropy(queries_BD, passages_BD)

    parts = len(cut(batches, budget=BUDGET, multiple=8))
    for keep, expected in ((NO_LIMIT_MIB, parts), (0, 2 * parts)):
        calls.clear()
        step_gradients([tower], encode=encode, loss=loss, batches=batches, keep_graph_mib=keep)
        assert calls == {"encode": expected + measured_twice(), "loss": 1}
    calls.clear()
    frozen, scale = Tower(frozen=True), nn.Parameter(torch.tensor(1.0))
    step = GradCache([lambda batch: encode(batch).detach(), frozen], lambda *e: scale * loss(*e), micro_batch_tokens=1)
    step(*batches)
    assert calls == {"encode": 9 + measured_twice(), "loss": 1}  # frozen: once a row, though nothing is kept


def test_a_graph_that_does_not_fit_is_made_again(batches):
    tower, graphs = Tower(), []
    _, expected = step_gradients([tower], batches=batches)

    def encode(batch):
        if torch.is_grad_enabled():
            graphs.append(1)
            if len(graphs) == 3:
                torch.rand(5)  # what was drawn before the failure must not shift the rest
                raise torch.OutOfMemoryError
        return tower(batch)

    assert_equal(step_gradients([tower], encode=encode, batches=batches)[1], expected)


def test_temperature_outside_the_encoder_and_a_frozen_encoder(batches):
    tower, scale = Tower(dropout=0.0), nn.Parameter(torch.tensor(3.0))

    def loss(queries_BD, passages_BD):
        labels = torch.arange(len(queries_BD), device=queries_BD.device)
        return F.cross_entropy(queries_BD @ passages_BD.T * scale.exp(), labels)

    loss(tower(batches[0]), tower(batches[1])).backward()
    expected, scale.grad = scale.grad, None
    step_gradients([tower], loss=loss, batches=batches)
    torch.testing.assert_close(scale.grad, expected)
    scale.grad = None
    tower.requires_grad_(False)
    assert step_gradients([tower], loss=loss, batches=batches)[1] == {}
    torch.testing.assert_close(scale.grad, expected)


def test_three_batches_two_towers_left_padding(batches):
    third = {name: value.flip(1) for name, value in random_batch(9, 12, seed=3).items()}
    queries, passages = Tower(seed=1, dropout=0.0), Tower(seed=2, dropout=0.0)
    positions = {"position_ids": torch.arange(12, device=device()).expand(9, 12).contiguous()}

    def loss(a_BD, b_BD, c_BD):
        return cross_entropy(a_BD, torch.cat([b_BD, c_BD]))

    for one in batches:
        one["position_ids"] = torch.arange(one["input_ids"].shape[1], device=device()).expand_as(one["input_ids"])
    loss(queries(batches[0]), passages(batches[1]), passages({**third, **positions})).backward()
    expected = take_gradients([queries, passages])
    encode = [queries.embed, passages.embed, passages.embed]
    _, actual = step_gradients(
        [queries, passages], encode=encode, loss=loss, batches=(*batches, {**third, **positions}), keep_graph_mib=0
    )
    assert_equal(actual, expected)


def test_a_batch_without_rows_and_a_loss_that_ignores_a_batch(batches):
    tower = Tower()
    empty = rows_of(batches[1], 0, 0)
    loss, gradients = step_gradients(
        [tower], batches=(empty, empty), loss=lambda q_BD, p_BD: (q_BD.sum() + p_BD.sum()) * 1.0
    )
    assert loss == 0
    assert all((grad == 0).all() for grad in gradients.values())
    _, gradients = step_gradients([tower], batches=batches, loss=lambda q_BD, p_BD: q_BD.pow(3).sum())
    assert any((grad != 0).any() for grad in gradients.values())


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 7), st.integers(1, 20)), min_size=1, max_size=3),
    budget=st.integers(1, 90),
    multiple=st.sampled_from([1, 8, 16]),
    left=st.booleans(),
    packed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_cuts_hold_every_token_once_within_the_budget(shapes, budget, multiple, left, packed, seed):
    group = [random_batch(rows, width, seed + number) for number, (rows, width) in enumerate(shapes)]
    if left:
        group = [{name: value.flip(1) for name, value in batch.items()} for batch in group]
    parts = cut(group, budget=budget, multiple=multiple, packed=packed)
    assert sum(part.rows for part in parts) == sum(rows for rows, _ in shapes)
    found = []
    for part in parts:
        tokens = take(group, part)
        assert tokens["input_ids"].shape == tokens["attention_mask"].shape == (max(part.rows, 1), part.width)
        assert part.rows <= 1 or part.tokens <= max(budget, part.rows)
        kept_BT = tokens["attention_mask"] == 1
        real = int(tokens["attention_mask"].sum(1).clamp(min=1).sum())
        assert part.tokens == (real if packed and part.rows else max(part.rows, 1) * part.width)
        found += [row[kept].tolist() for row, kept in zip(tokens["input_ids"], kept_BT, strict=True)] * bool(part.rows)
    expected = [
        row[kept == 1].tolist()
        for batch in group
        for row, kept in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert sorted(found) == sorted(expected)
    widths = [part.width for part in parts]
    assert multiple > 1 or widths == sorted(widths, reverse=True)


def test_only_tensors_of_tokens_are_trimmed():
    batch = random_batch(9, 12, 0)
    mask_BT = batch["attention_mask"]
    per_token = {**batch, "inputs_embeds": torch.randn(9, 12, 4), "boxes": torch.ones(9, 12, 2, dtype=torch.int64)}
    per_row = {"prices": torch.randn(9, 12), "images": torch.randn(9, 12, 2), "labels": torch.arange(9)}
    # A mask of floating-point numbers is one still, and a placeholder has the shapes of a micro-batch.
    group = [{**per_token, **per_row, "attention_mask": mask_BT.float(), "seen": mask_BT.bool()}]
    for part in [*cut(group, budget=24, multiple=1), placeholder(1)]:
        taken = take(group, part)
        assert {taken[name].shape[1] for name in (*per_token, "seen")} == {part.width}
        for name, value in per_row.items():
            assert taken[name].shape[1:] == value.shape[1:]
            if part.pieces:
                assert torch.equal(taken[name], value[part.pieces[0].rows_b])
    assert part.width < 12


def check_error(message: str, *batches, encode=None, loss=cross_entropy, **options):
    with pytest.raises(ValueError, match=message):
        GradCache(encode or Tower(), loss, **{"micro_batch_tokens": BUDGET, **options})(*batches)


def test_errors(batches):
    queries, passages = batches
    check_error("no batch given")
    check_error("mapping of tensors, got list", [1])
    check_error("needs a two-dimensional 'attention_mask'", {**queries, "attention_mask": torch.ones(9)})
    check_error("'extra' of shape \\(3,\\) beside 9 rows", {**queries, "extra": torch.zeros(3)})
    check_error("2 encoders for 1 batches", queries, encode=[Tower(), Tower()])
    check_error("same tensors", queries, {**passages, "extra": passages["input_ids"]})
    check_error("one embedding a row, \\[\\d+, D\\]; got \\(1, 32\\)", *batches, encode=lambda _: torch.zeros(1, 32))
    check_error("got \\(\\d+,\\)", *batches, encode=lambda batch: batch["input_ids"][:, 0].float())
    check_error("equally shaped", *batches, encode=lambda batch: batch["input_ids"].float())
    check_error("loss must return a 0-d tensor, got \\(9, 9\\)", *batches, loss=lambda q_BD, p_BD: q_BD @ p_BD.T)
    check_error("nothing to train", *batches, encode=Tower(frozen=True))
    check_error("micro_batch_tokens must be an integer of at least 1, or 'auto', or None; got 0", micro_batch_tokens=0)
    check_error("keep_graph_mib must be an integer of at least 0, or 'auto'; got 'all'", keep_graph_mib="all")
    check_error("got Tower; a module of one process needs no entry", modules=[Tower()])
    reentrant = Tower()
    reentrant.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    reentrant.backbone.enable_input_require_grads()
    check_error("reentrant gradient checkpointing", *batches, encode=reentrant)


# ---- several processes


def build(kind: str, towers: str, **options):
    """The encoders for (queries, passages), unwrapped ones with the same weights, and GradCache's options."""
    dropout, bucket_cap_mb = options.pop("dropout", 0.1), options.pop("bucket_cap_mb", 0.01)
    frozen = towers == "frozen"

    def make():
        both = [Tower(seed=1, frozen=frozen, dropout=dropout, **(options if not frozen else {}))]
        return both if towers == "shared" else [*both, Tower(seed=2, dropout=dropout, **options)]

    wrapped, plain = (
        [wrap(kind, tower.to(device()), bucket_cap_mb) for tower in make()],
        [tower.to(device()) for tower in make()],
    )
    gates = {"max_over_ranks": largest} if kind == "fsdp2" else {}
    return wrapped, plain, {"encode": wrapped[0] if towers == "shared" else wrapped, "loss": distributed_loss, **gates}


def wrap(kind: str, tower: Tower, bucket_cap_mb: float) -> nn.Module:
    if kind == "fsdp2":
        mesh = torch.distributed.device_mesh.init_device_mesh(device().type, (collectives.world_size(),))
        for layer in tower.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(tower, mesh=mesh)
    trains = any(parameter.requires_grad for parameter in tower.parameters())
    return DistributedDataParallel(tower, bucket_cap_mb=bucket_cap_mb) if trains else tower


def global_batches(rank: int, sizes: list[int]):
    whole = random_batch(sum(sizes), 8, seed=1), random_batch(sum(sizes), 16, seed=2)
    start = sum(sizes[:rank])
    return whole, tuple(rows_of(batch, start, start + sizes[rank]) for batch in whole)


def check_parity(rank: int, kind: str, sizes: list[int]):
    """Cached = one process with the global batch (no dropout); cached = kept graphs, bit by bit but for reductions."""
    whole, local = global_batches(rank, sizes)
    for lora, checkpointing, towers in itertools.product(
        (False, True), (False, True), ("shared", "separate", "frozen")
    ):
        case = (kind, sizes, f"lora={lora}", f"checkpointing={checkpointing}", towers)
        wrapped, plain, options = build(kind, towers, lora=lora, checkpointing=checkpointing)
        found = [
            step_gradients(wrapped, seed=rank, batches=local, keep_graph_mib=keep, reshard=keep == 0, **options)
            for keep in (0, NO_LIMIT_MIB)
        ]
        assert torch.equal(found[0][0], found[1][0]), case
        assert_equal(found[0][1], found[1][1], case, tolerance=1e-6)
        for module in itertools.chain(*(tower.modules() for tower in (*wrapped, *plain))):
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        cross_entropy(plain[0](whole[0]), plain[-1](whole[1])).backward()
        expected = take_gradients(plain)
        assert_equal(step_gradients(wrapped, batches=local, keep_graph_mib=0, **options)[1], expected, case)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("sizes", [[7], [4, 3], [3, 0, 4]], ids=str)
def test_parity(pool, kind, sizes):
    pool.run(check_parity, len(sizes), kind, sizes, timeout_s=150)


def check_uncut(rank: int, kind: str):
    """GradCache with nothing to cut = the step one writes by hand around DDP or FSDP2, dropout on."""
    _, local = global_batches(rank, [4, 3])
    for batch in local:
        batch["attention_mask"][0] = 1  # nothing to trim
    wrapped, _, options = build(kind, "shared")
    # By default DDP writes to the buffers at each forward, and the backward of the one before still needs BERT's
    # position_ids as they were: under NCCL autograd refuses such a step by hand.
    wrapped[0].broadcast_buffers = False
    torch.manual_seed(rank)
    distributed_loss(wrapped[0](local[0]), wrapped[0](local[1])).backward()
    by_hand = take_gradients(wrapped)
    _, actual = step_gradients(wrapped, seed=rank, batches=local, micro_batch_tokens=None, **options)
    assert_equal(actual, by_hand, kind)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_uncut_is_the_step_by_hand(pool, kind):
    pool.run(check_uncut, 2, kind)


def count_collectives(function) -> Counter:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return Counter(event.name for event in profile.events() if event.name.startswith("c10d::"))


def check_reductions(rank: int, kind: str):
    """However finely it is cut: each DDP bucket or FSDP2 group is reduced once."""
    _, local = global_batches(rank, [6, 3])
    _, _, options = build(kind, "separate", bucket_cap_mb=25)
    options["loss"] = cross_entropy  # no collectives of its own
    for tokens in (None, 1):
        step = GradCache(micro_batch_tokens=tokens, keep_graph_mib=0, **options)
        counts = count_collectives(lambda step=step: step(*local))
        if kind == "ddp":
            assert counts["c10d::allreduce_"] == 2, counts  # two towers of one bucket
            assert not any("reduce_scatter" in name for name in counts), counts
        else:
            assert counts["c10d::_reduce_scatter_base_"] == 2 * 3, counts  # two towers: two layers and the rest
            assert counts["c10d::allreduce_"] == 2 * 2, counts  # max_over_ranks: micro-batches and graphs kept


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_one_reduction_a_step(pool, kind):
    pool.run(check_reductions, 2, kind)


def check_overlap(rank: int):
    """DDP reduces the last layer's bucket before the first layer has its gradient, and no backward is added for it."""
    _, local = global_batches(rank, [6, 3])
    tower = DistributedDataParallel(Tower(dropout=0.0).to(device()), bucket_cap_mb=0.01)
    first = tower.module.backbone.embeddings.word_embeddings.weight
    first.register_post_accumulate_grad_hook(lambda _: events.append("first layer"))

    def reduce(_, bucket):
        events.append("bucket")
        work = torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True)
        assert work is not None
        return work.get_future().then(lambda future: future.value()[0])

    def encode(batch):
        events.append("encode")
        return tower(batch)

    tower.register_comm_hook(None, reduce)
    options = {"batches": local, "encode": encode, "modules": [tower], "loss": distributed_loss}
    for _ in range(3):  # in the first DDP learns in which order gradients come
        events: list[str] = []
        step_gradients([tower], keep_graph_mib=NO_LIMIT_MIB, **options)
    assert events.count("first layer") == events.count("encode") - measured_twice()
    last = max(place for place, event in enumerate(events) if event == "first layer")
    assert events[:last].count("bucket") > 3, events


def test_ddp_reduces_during_the_last_backward(pool):
    pool.run(check_overlap, 2)


class TwoTowers(nn.Module):
    """Both towers and a layer that is never used, in one module."""

    def __init__(self):
        super().__init__()
        self.towers = nn.ModuleList([Tower(seed=1, dropout=0.0), Tower(seed=2, dropout=0.0)])
        self.unused = nn.Linear(3, 3)

    def forward(self, batch, tower):
        return self.towers[tower](batch)


def check_one_module(rank: int, find_unused: bool):
    whole, local = global_batches(rank, [5, 0])
    plain = TwoTowers().to(device())
    cross_entropy(plain(whole[0], 0), plain(whole[1], 1)).backward()
    expected = take_gradients([plain])
    wrapped = DistributedDataParallel(TwoTowers().to(device()), find_unused_parameters=find_unused, bucket_cap_mb=0.01)
    through = [lambda batch: wrapped(batch, 0), lambda batch: wrapped(batch, 1)]
    around = [lambda batch: wrapped.module(batch, 0), lambda batch: wrapped.module(batch, 1)]
    for encode in (through, around, through):
        _, actual = step_gradients([wrapped], batches=local, encode=encode, loss=distributed_loss, modules=[wrapped])
        unused = {name: grad for name, grad in actual.items() if "unused" in name}
        assert not any(grad.any() for grad in unused.values())
        assert_equal({name: grad for name, grad in actual.items() if name not in unused}, expected)
    with pytest.raises(ValueError, match=r"static_graph=\.\.\.\) is not supported"):
        GradCache(DistributedDataParallel(Tower().to(device()), static_graph=True), distributed_loss)
    with pytest.raises(ValueError, match="compile the module inside"):
        GradCache(torch.compile(wrapped), distributed_loss)


@pytest.mark.parametrize("find_unused", [False, True])
def test_two_towers_in_one_module_unused_parameters_and_a_rank_without_rows(pool, find_unused):
    pool.run(check_one_module, 2, find_unused)


def check_accumulation(rank: int, kind: str):
    """Two halves, the first kept local: the sum of their gradients, in one reduction."""
    _, local = global_batches(rank, [6, 4])
    wrapped, _, options = build(kind, "shared", dropout=0.0)
    half = len(local[0]["input_ids"]) // 2
    halves = [[rows_of(batch, *bounds) for batch in local] for bounds in ((0, half), (half, 2 * half))]
    apart = [step_gradients(wrapped, batches=part, **options)[1] for part in halves]
    step = GradCache(micro_batch_tokens=BUDGET, keep_graph_mib=0, **options)
    step(*halves[0], reduce=False)
    step(*halves[1])
    assert_equal(take_gradients(wrapped), {name: grad + apart[1][name] for name, grad in apart[0].items()})
    if kind == "fsdp2":
        with pytest.raises(ValueError, match="give max_over_ranks"):
            GradCache(wrapped[0], distributed_loss)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_accumulation_reduces_the_sum(pool, kind):
    pool.run(check_accumulation, 2, kind)
