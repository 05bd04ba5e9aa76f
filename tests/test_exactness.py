"""Every public entry in the situations that trainers bring it into: the gradient of one process, in float64.

Each test is a part of a row of the table in docs/gradient.md, which says on how many processes a cell is exact.

Shapes: B local queries, N local passages, D dimension.
"""

import copy
import re
from contextlib import ExitStack, nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from inbatch import FalseNegatives, GradCache, InfoNCELoss, collectives, info_nce, max_over_ranks
from inbatch.inbatch_neg_utils import (
    dist_gather_tensor,
    dist_gather_tensor_with_dim1_padding,
    mask_gathered_passages_same_doc_as_positive,
    positive_columns,
)
from inbatch.integrations import sentence_transformers as st
from tests.helpers import REPOSITORY, device

T, PER_ROW, SCALE = 0.2, 2, 2.0**7
UNEVEN = {1: [4], 2: [4, 3], 3: [2, 1, 4]}
EMPTY = {1: None, 2: [5, 0], 3: [3, 0, 4]}
EQUAL = {1: [4], 2: [3, 3], 3: [2, 2, 2]}


class Towers(nn.Module):
    """Two small towers, or one for both sides, which give [b, D] for a side's rows."""

    def __init__(self, separate: bool):
        super().__init__()
        torch.manual_seed(0)
        self.query = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8))
        self.passage = copy.deepcopy(self.query) if separate else self.query
        self.checkpointed = False

    def forward(self, batch):
        tower = self.query if batch["side"] == "query" else self.passage
        rows = checkpoint(tower, batch["x"], use_reentrant=False) if self.checkpointed else tower(batch["x"])
        return F.normalize(rows.float() if rows.dtype == torch.bfloat16 else rows, dim=1)


class Named(nn.Module):
    """The same, as sentence-transformers has it."""

    def __init__(self, model):
        super().__init__()
        self.model, self.max_seq_length = model, None

    def forward(self, batch):
        return {"sentence_embedding": self.model(batch)}


class Part:
    """One forward and backward's rows: of all ranks, and of this one."""

    def __init__(self, sizes, seed, rank=None):
        generator = torch.Generator().manual_seed(seed)
        rows, before = sum(sizes), 0 if rank is None else sum(sizes[:rank])
        mine = slice(before, rows if rank is None else before + sizes[rank])
        self.sizes, self.ids = sizes, (torch.arange(rows * PER_ROW) // 5).view(rows, PER_ROW)[mine].to(device())
        x = torch.randn(rows, 1 + PER_ROW, 6, generator=generator)[mine].to(device())
        self.queries = {"x": x[:, 0].contiguous(), "side": "query"}
        self.passages = {"x": x[:, 1:].flatten(0, 1), "side": "passage"}
        self.columns = [self.queries, *({"x": x[:, 1 + n].contiguous(), "side": "passage"} for n in range(PER_ROW))]


# ---- the entries: (queries [B, D], passages [N, D], part) -> loss


def by_seed(gather, queries_BD, passages_ND, part, masked=False):
    """As NeMo AutoModel's recipe, with the rows of all ranks weighted alike."""
    everyone = gather(passages_ND, preserve_grad=True)
    scores = queries_BD @ everyone.T / T
    if masked:
        ids = dist_gather_tensor(part.ids.flatten())
        rank, rows = collectives.rank(), len(queries_BD)
        mask_gathered_passages_same_doc_as_positive(scores, ids, PER_ROW, rank, rows)
    labels = positive_columns(len(queries_BD), PER_ROW, device())
    return F.cross_entropy(scores.float(), labels, reduction="sum") * len(part.sizes) / sum(part.sizes)


def by_ids(queries_BD, passages_ND, part):
    ids = FalseNegatives(passage_ids=part.ids.flatten())
    return info_nce(queries_BD, passages_ND, temperature=T, false_negatives=ids)


def by_tokens(queries_BD, passages_ND, part):
    return info_nce(queries_BD.unflatten(1, (2, 4)), passages_ND.unflatten(1, (2, 4)), temperature=T)


def ours(queries_BD, passages_ND, part, **options):
    return info_nce(queries_BD, passages_ND, temperature=T, **options)


def learnt(loss, queries_BD, passages_ND, part):
    return loss(queries_BD, passages_ND)


# By column of the table. None: the loss of sentence-transformers by this name, which encodes as well.
ENTRIES = {
    "`info_nce`": {
        "reference": partial(ours, impl="reference"),
        "tiled": partial(ours, impl="tiled"),
        "ring": partial(ours, negatives="ring"),
        "ring, reference": partial(ours, negatives="ring", impl="reference"),
        "local": partial(ours, negatives="local"),
    },
    "ids": {"masked": by_ids},
    "several vectors": {"max_sim": by_tokens},
    "`InfoNCELoss`, learnable": {"learnable": learnt},
    "drop-in gathers": {
        "gather": partial(by_seed, dist_gather_tensor),
        "padded": partial(by_seed, dist_gather_tensor_with_dim1_padding),
    },
    "drop-in mask": {"masked, equal ranks": partial(by_seed, dist_gather_tensor, masked=True)},
    "`GradCache()`": {"call": ours},
    "`GradCache.loss`": {"cached": ours, "cached, learnable": learnt},
    "`...RankingLoss`": {"MultipleNegativesRankingLoss": None},
    "`Cached...`": {"CachedMultipleNegativesRankingLoss": None},
}
CACHED = {"micro_batch_tokens": 2, "keep_graph_mib": 0, "max_over_ranks": max_over_ranks}


class Loss(nn.Module):
    """An entry with what it holds: part -> loss. `GradCache()` has then done the backward as well."""

    def __init__(self, entry, loss, encode, wrappers, *, wrap, scaled):
        super().__init__()
        self.entry, self.sides = entry, encode if isinstance(encode, list) else [encode, encode]
        self.modules_held = nn.ModuleList({id(one): one for one in self.sides}.values())
        self.learnable = InfoNCELoss(T, learnable=True).to(device()) if "learnable" in entry else None
        self.loss = self.step = None
        if loss is None:
            options = {"mini_batch_num_tokens": 2} if "Cached" in entry else {}
            self.step = getattr(st, entry)(encode, temperature=T, **options)
            return
        self.loss = wrap(loss if self.learnable is None else partial(loss, self.learnable))
        if entry == "call":
            self.step = GradCache(encode, lambda q, p, part: scaled(self.loss(q, p, part)), modules=wrappers, **CACHED)
        elif "cached" in entry:
            self.step = GradCache(encode, self.loss, modules=wrappers, **CACHED)

    def forward(self, part, **options):
        if self.loss is None:
            return self.step(part.columns)
        if self.step is None:
            return self.loss(self.sides[0](part.queries), self.sides[1](part.passages), part)
        step = self.step if self.entry == "call" else self.step.loss
        return step(part.queries, part.passages, loss_kwargs={"part": part}, **options)


# ---- the truth


def oracle(entry, model, parts):
    """The dense formula in float64 on the rows of all ranks; a gradient for each trained parameter, the mean loss."""
    model = copy.deepcopy(model).double()
    model.checkpointed = False
    log_t = torch.tensor(T, dtype=torch.float64).log().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for part in parts:
        q, p = (model({**side, "x": side["x"].double()}) for side in (part.queries, part.passages))
        scores = q @ p.T
        if entry == "max_sim":
            scores = torch.einsum("bqd,npd->bnqp", q.unflatten(1, (2, 4)), p.unflatten(1, (2, 4))).amax(-1).sum(-1)
        scores, labels, ids = scores / log_t.exp(), torch.arange(len(q), device=q.device) * PER_ROW, part.ids.flatten()
        columns = torch.arange(len(p), device=q.device)
        left_out = torch.zeros_like(scores, dtype=torch.bool)
        if "masked" in entry:
            left_out = (ids[labels][:, None] == ids) & (columns != labels[:, None])
        if entry == "local":
            rank_of_row = torch.repeat_interleave(torch.arange(len(part.sizes)), torch.tensor(part.sizes)).to(q.device)
            left_out = rank_of_row[:, None] != rank_of_row.repeat_interleave(PER_ROW)
        total = total + F.cross_entropy(scores.masked_fill(left_out, -torch.inf), labels) / len(parts)
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients | ({"temperature": log_t.grad} if "learnable" in entry else {}), total.detach()


def gradients_of(model, loss):
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if loss.learnable is not None and loss.learnable.log_temperature.grad is not None:
        grads["temperature"] = loss.learnable.log_temperature.grad
    return {name: getattr(grad, "full_tensor", lambda grad=grad: grad)().double() for name, grad in grads.items()}


def assert_gradients(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    scale = max(grad.abs().max() for name, grad in expected.items() if name != "temperature")
    for name, grad in expected.items():
        error = float((actual[name] - grad).abs().max() / (scale if name != "temperature" else grad.abs()))
        assert error <= tolerance, (name, error)


def assert_loss(mine, expected, tolerance):
    mean = collectives.all_reduce(mine.detach().clone().double()) / collectives.world_size()
    torch.testing.assert_close(mean, expected, rtol=tolerance, atol=tolerance)


# ---- the situations: each brings one of these into it

ROWS = {
    "uneven ranks": (1, 2, 3),
    "an empty rank": (2, 3),
    "accumulation": (1, 2, 3),
    "two losses, one backward": (1, 2, 3),
    "no_grad before": (1, 2, 3),
    "autocast": (1, 2, 3),
    "GradScaler": (1, 2, 3),
    "compiled model": (2,),
    "compiled loss": (2,),
    "checkpointed model": (1, 2, 3),
    "checkpointed loss": (1, 2, 3),
    "moving average": (1, 2, 3),
    "two towers": (1, 2, 3),
    "two models": (1, 2, 3),
    "a frozen tower": (1, 2, 3),
    "DDP in a module": (2, 3),
    "DDP around the loss": (2, 3),
    "FSDP2": (1, 2, 3),
}


def compiled(function):
    return torch.compile(function, backend="eager", dynamic=True)


def checkpointed(function):
    return lambda *args, **kwargs: checkpoint(function, *args, use_reentrant=False, **kwargs)


def replicated(module):
    trains = any(p.requires_grad for p in module.parameters())
    return DistributedDataParallel(module) if collectives.world_size() > 1 and trains else module


def spread(situation, inner):
    """Return what encodes, and the wrappers that reduce."""
    if situation == "FSDP2":
        fully_shard(inner)
        if device().type == "cpu":
            inner.set_force_sum_reduction_for_comms(True)
        return inner, [inner]
    if situation == "DDP around the loss":
        return inner, []
    if situation == "two models":
        encode = [replicated(OneSide(inner, side)) for side in ("query", "passage")]
        return encode, [one for one in encode if isinstance(one, DistributedDataParallel)]
    wrapped = replicated(inner)
    return (
        nn.Sequential(wrapped) if situation == "DDP in a module" else wrapped,
        [wrapped] if wrapped is not inner else [],
    )


def evaluate_before(loss, part, value, model):
    """An evaluation leaves no trace."""
    for mode in (torch.no_grad, torch.inference_mode):
        if mode is torch.no_grad or loss.entry != "call":
            with mode():
                assert_loss(loss(part), value, 1e-5)
            assert not gradients_of(model, loss)


def check_average(model, loss, part, value):
    """A copy of the model and of the loss that learns computes the same and gets no gradient."""
    held = nn.ModuleDict({"model": model, **({"loss": loss.learnable} if loss.learnable else {})})
    average = AveragedModel(held)
    average.update_parameters(held)
    copied = average.module
    with torch.no_grad():
        q, p = copied["model"](part.queries), copied["model"](part.passages)
        if loss.loss is None:
            assert_loss(type(loss.step)(Named(copied["model"]), temperature=T)(part.columns), value, 1e-5)
        else:
            assert_loss(copied["loss"](q, p) if loss.learnable else loss.loss(q, p, part), value, 1e-5)
    return average


def outcome(situation, entry, function, rank, size):
    """Return "exact", or "refused" where the entry says by ValueError that it does not do this; else an error."""
    sizes = (EMPTY if situation == "an empty rank" else UNEVEN)[size]
    if "equal" in entry and situation != "uneven ranks":
        sizes = EQUAL[size]
    model = Towers(separate=situation in ("two towers", "two models", "a frozen tower")).to(device())
    model.checkpointed = situation == "checkpointed model"
    if situation == "a frozen tower":
        model.passage.requires_grad_(False)
    seeds = range(2 if situation in ("accumulation", "two losses, one backward") else 1)
    parts = [Part(sizes, seed, rank) for seed in seeds]
    truth, value = oracle(entry, model, [Part(sizes, seed) for seed in seeds])
    if situation == "compiled model":
        model.forward = compiled(model.forward)
    encode, wrappers = spread(situation, Named(model) if function is None else model)
    scaler = torch.amp.GradScaler(device().type, init_scale=SCALE, enabled=situation == "GradScaler")
    wrap = {"compiled loss": compiled, "checkpointed loss": checkpointed}.get(situation, lambda loss: loss)
    loss = Loss(entry, function, encode, wrappers, wrap=wrap, scaled=scaler.scale)
    run = replicated(loss) if situation == "DDP around the loss" else loss
    if situation == "no_grad before":
        evaluate_before(loss, parts[0], value, model)
    average = check_average(model, loss, parts[0], value) if situation == "moving average" else None
    losses = []
    for number, part in enumerate(parts):
        last = number + 1 == len(parts)
        waits = not last and size > 1 and situation == "accumulation"
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(device().type, torch.bfloat16, enabled=situation == "autocast"))
            stack.enter_context(wrappers[0].no_sync() if waits else nullcontext())
            losses.append(run(part, reduce=last) if entry == "call" else run(part))
            if entry != "call" and situation == "accumulation":
                scaler.scale(losses[-1] / len(parts)).backward()
    mean = sum(losses) / len(parts)
    if entry != "call" and situation != "accumulation":
        scaler.scale(mean).backward()
    if situation == "GradScaler":
        scaler.unscale_(torch.optim.SGD([p for p in loss.parameters() if p.requires_grad], lr=0.1))
    assert average is None or not any(p.grad is not None for p in average.parameters())
    tolerance = 3e-2 if situation == "autocast" else 1e-5
    assert_loss(mean / SCALE if situation == "GradScaler" and entry == "call" else mean, value, tolerance)
    # The call leaves the sum over the calls.
    divisor = len(parts) if entry == "call" else 1
    assert_gradients({n: grad / divisor for n, grad in gradients_of(model, loss).items()}, truth, tolerance)
    return "exact"


class OneSide(nn.Module):
    """One of two towers as a model of its own, with parameters of its own."""

    def __init__(self, towers, side):
        super().__init__()
        self.tower = getattr(towers, side)

    def forward(self, batch):
        return F.normalize(self.tower(batch["x"]), dim=1)


MEANINGLESS = {
    # sentence-transformers' losses take one model, and are called by name alone.
    **dict.fromkeys(("two models", "compiled loss", "checkpointed loss"), ("`...RankingLoss`", "`Cached...`")),
    "an empty rank": ("drop-in mask",),
}
REFUSALS = "which this function takes for granted|columns, scores has|which is not in modules"


def cells(rank, size, situation):
    found = {}
    for column, entries in ENTRIES.items():
        for entry, function in entries.items() if column not in MEANINGLESS.get(situation, ()) else ():
            try:
                result = outcome(situation, entry, function, rank, size)
            except ValueError as error:
                if not re.search(REFUSALS, str(error)):
                    raise
                result = "refused"
            except Exception as error:
                raise AssertionError(f"{column}, {entry}") from error
            found.setdefault(column, set()).add(result)
    return found


def table() -> dict[str, dict[str, str]]:
    """Read the table of docs/gradient.md: by row and column."""
    text = (REPOSITORY / "docs" / "gradient.md").read_text()
    lines = text.partition("\n| situation |")[2].partition("\n\n")[0].splitlines()
    columns = [name.strip() for name in lines[0].strip("|").split("|")]
    rows = [[one.strip() for one in line.strip("|").split("|")] for line in lines[2:]]
    return {row[0]: dict(zip(columns, row[1:], strict=True)) for row in rows}


@pytest.mark.parametrize(("situation", "size"), [(row, size) for row, sizes in ROWS.items() for size in sizes])
def test_it_is_the_gradient_of_one_process(pool, situation, size):
    found = pool.run(cells, size, size, situation, timeout_s=200)[0]
    assert table().keys() == ROWS.keys()
    said = table()[situation]
    assert said.keys() == ENTRIES.keys()
    for column, cell in said.items():
        expected = {"exact"} if str(size) in cell.split() else {"refused"} if "refused" in cell else set()
        assert found.get(column, set()) == expected, column
    assert all(set(cell.split()) <= {*map(str, ROWS[situation]), "refused", "-"} for cell in said.values())
