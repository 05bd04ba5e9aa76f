"""The Triton path against float64: on a GPU where there is one, else its kernels' logic in Triton's interpreter.

Without a GPU everything here is skipped but `test_in_the_interpreter`, which runs this file again, interpreted, in
float32 on small shapes. Shapes: R rows, C columns, D dimension, B queries, M passages.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="the fused path needs triton")

from inbatch import info_nce
from inbatch.losses import CLIP, GTE, FalseNegatives, LossStats, tiled
from inbatch.losses.kernels import Block, Groups, Kernels
from inbatch.losses.triton import host as fused
from inbatch.losses.triton import launch as _launch
from tests.helpers import REPOSITORY

CUDA = torch.cuda.is_available() and not fused.INTERPRETED
DEVICE = torch.device("cuda" if CUDA else "cpu")
HALVES = [torch.bfloat16, torch.float16] if CUDA else []
DTYPES = [torch.float32, *HALVES]
LIKE_THIS = [str(Path(__file__).parent / "test_triton_max_sim.py")]  # run by the interpreter, too
on_device = pytest.mark.skipif(not CUDA and not fused.INTERPRETED, reason="no GPU here, and not in the interpreter")
on_gpu = pytest.mark.skipif(not CUDA, reason="no GPU here")

# Relative error of a gradient, or of E: float32 products, or one rounding to half precision and a little.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2.5e-3, torch.float16: 2.5e-3}


def error(found: Tensor, truth: Tensor) -> float:
    found, truth = found.double(), truth.double()
    assert found.isfinite().all()
    return ((found - truth).norm() / truth.norm().clamp_min(1e-300)).item()


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(low: int, high: int, shape: tuple[int, ...], seed: int) -> Tensor:
    values = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    return values.to(DEVICE)


def make_block(
    R: int, C: int, D: int, dtype: torch.dtype, *,
    keys: int = 0, limit: bool = False, groups: bool = False, scale: float = 20.0,
):  # fmt: skip
    pairs = []
    for pair in range(keys):  # several agree in their lower 32 bits
        row_keys, column_keys = (
            torch.where(values > 3, values << 32, values)
            for values in (
                integers(-1, 6, (R, 2 - pair), 4 + pair).long(),
                integers(-1, 6, (C, 1 + pair), 6 + pair).long(),
            )
        )
        pairs.append((row_keys, column_keys))
    return Block(
        rows=F.normalize(random(R, D, seed=1), dim=1).to(DEVICE, dtype),
        columns=F.normalize(random(C, D, seed=2), dim=1).to(DEVICE, dtype),
        positive=integers(-1, C, (R,), 3),
        scale=torch.full((R,), scale, device=DEVICE),
        keys=tuple(pairs),
        limit=random(R, seed=8).to(DEVICE, torch.float32) * 5 if limit else None,
        groups=make_groups(R, C) if groups else None,
    )


def make_groups(R: int, C: int) -> Groups:
    """A few groups of rows and columns, every rule, and other factors for every row."""
    positive = integers(0, 2, (C, 1), 11).long()
    return Groups(
        rows=integers(0, 4, (R, 1), 10).long() * 2 + 1,
        columns=integers(-1, 4, (C, 1), 12).long() * 2 + positive,
        rules=integers(0, 8, (R,), 13),
        own=1 + random(R, seed=14).abs().to(DEVICE, torch.float32),
        others=1 + random(R, seed=15).abs().to(DEVICE, torch.float32),
    )


def truth(block: Block, pivot: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """E, its row sums, how many columns are masked, how many others score above the pivot; in float64, densely."""
    scores = block.rows.double() @ block.columns.double().T * block.scale.double()[:, None]
    masked = torch.zeros_like(scores, dtype=torch.bool)
    for row_keys, column_keys in block.keys:
        row_keys = row_keys[:, None, :, None]
        masked |= ((row_keys == column_keys[None, :, None, :]) & (row_keys != -1)).any(3).any(2)
    if block.limit is not None:
        masked |= scores > block.limit[:, None]
    if (groups := block.groups) is not None:
        same, positive = groups.rows // 2 == groups.columns[:, 0] // 2, groups.columns[:, 0] % 2 == 1
        rule = groups.rules[:, None]
        masked &= ~(same & ~positive & (rule // 4 == 1))
        masked |= ~same & torch.where(positive, rule // 2 % 2 == 1, rule % 2 == 1)
        scores = scores * torch.where(same, groups.own[:, None], groups.others[:, None]).double()
    own = torch.arange(scores.shape[1], device=DEVICE) == block.positive[:, None]
    masked &= ~own
    exp = torch.where(masked | own, 0.0, torch.exp(scores - pivot.double()[:, None]))
    return exp, exp.sum(1), masked.sum(1), (exp > 1).sum(1)


SHAPES = [(1, 1, 1), (63, 257, 17), (33, 64, 16), (40, 129, 24)] + (
    [(300, 1000, 200), (257, 513, 1024)] if CUDA else []
)


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("keys", "limit", "groups"),
    [(0, False, False), (1, False, False), (2, True, False), (0, False, True), (2, True, True)],
)
def test_exponentials_and_sums(shape, dtype, keys, limit, groups):
    block = make_block(*shape, dtype, keys=keys, limit=limit, groups=groups)
    pivot = random(shape[0], seed=9).to(DEVICE, torch.float32)
    counts = torch.zeros(shape[0], 2, dtype=torch.int32, device=DEVICE)
    exp, sums, pivots = fused.exp_scores(replace(block, counts=counts), pivot)
    true_exp, true_sums, masked, above = truth(block, pivot)
    assert error(exp, true_exp) <= TOLERANCE[dtype]
    assert error(sums, true_sums) <= 1e-5
    assert torch.equal(pivots, pivot)
    assert torch.equal(exp == 0, true_exp == 0)
    assert torch.equal(counts.long(), torch.stack([masked, above], 1))
    nothing, again, _ = fused.exp_scores(block, pivot, keep=False)
    assert nothing is None
    assert torch.equal(again, sums)


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("R", "D"), [(1, 1), (65, 17), (130, 64)])
def test_positive_scores(R, D, dtype):
    rows, passages = (random(size, D, seed=size).to(DEVICE, dtype) for size in (R, 3 * R))
    scores, scales = fused.positive_scores(rows, passages[::3], torch.tensor(7.0, device=DEVICE))
    assert scores.dtype == scales.dtype == torch.float32
    assert error(scores, 7 * (rows.double() * passages[::3].double()).sum(1)) <= 1e-5
    torch.testing.assert_close(scales, torch.full_like(scales, 7.0), rtol=1e-5, atol=0)


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_positive_that_cancels_does_not_change_its_row(dtype):
    rows = random(40, 96, seed=1).to(DEVICE, dtype)
    other = rows.clone()
    other[:, 1::2] *= -1  # half the terms against the other half
    _, scales = fused.positive_scores(rows, other, torch.tensor(7.0, device=DEVICE))
    cancels = (rows.double() * other.double()).sum(1).abs() < 0.2 * rows.double().square().sum(1)
    assert cancels.any()
    assert (scales[cancels] == 7).all()


@on_device
def test_a_chunk_of_rows_is_those_rows():
    block = make_block(70, 50, 16, torch.float32, keys=1)
    pivot = random(70, seed=9).to(DEVICE, torch.float32)
    whole = fused.exp_scores(block, pivot)
    counts = torch.zeros(70, 2, dtype=torch.int32, device=DEVICE)
    part = fused.exp_scores(replace(block, counts=counts).part(37, 70), pivot[37:])
    for full, some in zip(whole, part, strict=True):
        torch.testing.assert_close(some, full[37:], rtol=1e-5, atol=0)
    assert not counts[:37].any()
    assert counts[37:].any()


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [False, True])
def test_rows_far_above_their_pivot_are_exact(dtype, groups):
    block = make_block(40, 70, 16, dtype, keys=1, groups=groups, scale=300.0)
    pivot = torch.full((40,), 150.0, device=DEVICE)
    pivot[::3] = -250.0
    exp, sums, pivots = fused.exp_scores(block, pivot)
    changed = pivots != pivot
    assert changed.any()
    assert not changed.all()
    true_exp, true_sums, _, _ = truth(block, pivots)
    tolerance = 1e-4 if dtype == torch.float32 else 4e-3  # the pivot itself is rounded at 250
    assert error(exp, true_exp) <= tolerance
    assert error(sums, true_sums) <= 1e-4
    torch.testing.assert_close(true_exp[changed].amax(1), torch.ones_like(true_exp[changed][:, 0]), rtol=1e-4, atol=0)


@on_device
def test_finish_keeps_the_digits_of_tiny_and_of_huge_losses():
    sums = torch.tensor([0.0, 1e-30, 1e-9, 1e-4, 2.0, 3.0, 1.5], device=DEVICE)
    rises = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 88.0, 400.0], device=DEVICE)
    positive = torch.linspace(-40, 40, 7, device=DEVICE)
    loss, coefficient = torch.empty(2, 7, device=DEVICE)
    for scale in (2.0, torch.tensor(2.0, device=DEVICE)):
        (weight,) = fused.finish([sums], [positive + rises], positive, scale, 0.25, loss, coefficient)
    rise64, sum64 = (positive + rises).double() - positive.double(), sums.double()
    z = sum64 + torch.exp(-rise64)
    true_loss = torch.where(rise64 == 0, torch.log1p(sum64), rise64 + z.log())
    torch.testing.assert_close(loss.double(), 0.25 * true_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(weight.double(), 0.5 / z, rtol=1e-6, atol=0)
    torch.testing.assert_close(coefficient.double(), -0.5 * sum64 / z, rtol=1e-6, atol=0)


@on_device
@pytest.mark.parametrize("dtype", DTYPES if CUDA else [torch.float32], ids=str)
def test_gradients_overwrite_or_add(dtype):
    block = make_block(45, 70, 24, dtype)
    d_rows, d_columns = (torch.full(like.shape, math.nan, device=DEVICE) for like in (block.rows, block.columns))
    block = replace(block, d_rows=d_rows, d_columns=d_columns)
    exp, _, _ = fused.exp_scores(block, torch.zeros(45, device=DEVICE))
    weight = random(45, seed=10).abs().to(DEVICE, torch.float32)
    true_rows = weight.double()[:, None] * (exp.double() @ block.columns.double())
    true_columns = exp.double().T @ (weight.double()[:, None] * block.rows.double())
    for adds in (False, True):
        block = replace(block, adds_to_rows=adds, adds_to_columns=adds)
        fused.add_gradients(block, exp, weight, rows=True, columns=True)
        assert error(d_rows, (1 + adds) * true_rows) <= TOLERANCE[dtype]
        assert error(d_columns, (1 + adds) * true_columns) <= TOLERANCE[dtype]
    before = d_rows.clone()
    fused.add_gradients(replace(block, adds_to_columns=False), exp, weight, rows=False, columns=True)
    assert error(d_columns, true_columns) <= TOLERANCE[dtype]
    assert torch.equal(before, d_rows)
    part = block.part(5, 45)
    assert part.adds_to_columns
    assert part.d_rows is not None
    assert part.d_rows.data_ptr() == d_rows[5:].data_ptr()
    fused.add_gradients(replace(part, adds_to_rows=False), exp[5:], weight[5:], rows=True, columns=False)
    assert error(d_rows[5:], true_rows[5:]) <= TOLERANCE[dtype]
    assert torch.equal(before[:5], d_rows[:5])


def leaves(B: int, M: int, D: int, dtype: torch.dtype, *, strided: bool = False) -> tuple[Tensor, Tensor]:
    """Unit vectors that share a direction, each query's positive (the first of its group) closer."""
    common = F.normalize(random(D, seed=20), dim=0)
    queries, passages = random(B, D, seed=21) / D**0.5, random(M, D, seed=22) / D**0.5
    passages[:: M // B] += 0.3 * queries
    made = []
    for each in (queries, passages):
        unit = F.normalize(0.6 * each + 0.8 * common, dim=1).to(DEVICE, dtype)
        made.append((unit.T.contiguous().T if strided else unit).requires_grad_())
    return made[0], made[1]


CASES = {
    "plain": {},
    "cold": {"temperature": 0.01},
    "chunks": {"chunk_mib": 0.02},
    "positives anywhere": {"positives": "some"},
    "learnable temperature": {"temperature": "tensor"},
    "false negatives": {"false_negatives": "ids"},
    "both ways": {"objective": CLIP},
    "every direction": {"objective": GTE, "false_negatives": "ids"},
}


def loss_and_gradients(impl: str, case: dict, B: int, M: int, D: int, dtype: torch.dtype, compute: torch.dtype):
    strided = case.get("chunk_mib") is not None
    queries, passages = (each.detach().to(compute).requires_grad_() for each in leaves(B, M, D, dtype, strided=strided))
    options = {"temperature": 0.05, **case}
    if options["temperature"] == "tensor":
        options["temperature"] = torch.tensor(0.05, device=DEVICE, dtype=torch.float32, requires_grad=True)
    if "positives" in options:
        options["positives"] = integers(0, M, (B,), 23).long()
    if "false_negatives" in options:
        ids = integers(0, M // 2, (M,), 24).long()
        options["false_negatives"] = FalseNegatives(
            passage_ids=ids, query_ids=integers(0, B, (B,), 25).long(), positive_ids=ids[:B, None].flip(0), margin=0.05
        )
    loss = info_nce(queries, passages, impl=impl, **options)
    (3 * loss).backward()
    found = {"loss": loss.detach(), "queries": queries.grad, "passages": passages.grad}
    if isinstance(options["temperature"], Tensor):
        found["temperature"] = options["temperature"].grad
    return found


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_the_formula(case, dtype):
    shape = (96, 384, 200) if CUDA else (33, 66, 20)
    found = loss_and_gradients("fused", CASES[case], *shape, dtype, dtype)
    true = loss_and_gradients("reference", CASES[case], *shape, dtype, torch.float64)
    assert abs(found["loss"].item() - true["loss"].item()) <= max(2e-5 * abs(true["loss"].item()), 1e-7)
    for name in ("queries", "passages", "temperature"):
        if name in true:
            assert found[name].dtype == (torch.float32 if name == "temperature" else dtype)
            assert error(found[name], true[name]) <= TOLERANCE[dtype], name


@on_device
def test_runs_repeat_bit_for_bit():
    runs = [loss_and_gradients("fused", CASES["chunks"], 33, 66, 20, torch.float32, torch.float32) for _ in range(2)]
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name])


@on_device
def test_statistics_are_those_of_the_tiled_path():
    queries, passages = leaves(33, 66, 20, torch.float32)
    collected = []
    for impl in ("fused", "tiled"):
        stats = LossStats()
        info_nce(queries, passages, impl=impl, stats=stats, false_negatives=FalseNegatives(margin=0.02))
        collected.append(stats.result())
    assert collected[0] == pytest.approx(collected[1])


@on_device
@pytest.mark.parametrize("masked", [False, True])
def test_the_dense_kernel_of_small_batches(masked):
    B, M, temperature = 7, 21, 0.05
    dots = random(B, M, seed=30).to(DEVICE, torch.float32)
    dots[1, 3] = 9.0  # a row whose positive wins by far
    dots[2, 5] = 9.0  # and one that loses by 100 nats and more
    shares, loss, coefficient = (torch.full(shape, math.nan, device=DEVICE) for shape in ((B, M), (B,), (B,)))
    ids = integers(-1, 5, (M,), 31).long()
    arguments = (dots, shares, loss, coefficient, ids, M, 3, 1 / temperature, 0.5)
    _launch.launch(fused.row_kernels.dense_kernel, B, arguments, {"IDS": masked, "BLOCK": 16})
    scores, own = (dots.double() / temperature).requires_grad_(), torch.arange(B, device=DEVICE) * 3
    same = (ids[own, None] == ids) & (ids[own, None] != -1) & (torch.arange(M, device=DEVICE) != own[:, None])
    true_loss = F.cross_entropy(scores.masked_fill(same & masked, -math.inf), own, reduction="none")
    (true_loss.sum() / 2).backward()
    torch.testing.assert_close(loss.double(), true_loss.detach(), rtol=1e-5, atol=1e-12)
    shares[torch.arange(B), own] += coefficient
    torch.testing.assert_close(shares.double(), scores.grad, rtol=1e-4, atol=1e-9)


@on_gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("R", "C", "D"), [(1, 1, 8), (300, 1000, 64), (129, 700, 1024), (2000, 9000, 384)])
@pytest.mark.parametrize(("keys", "limit", "count"), [(0, False, False), (1, False, True), (2, True, False)])
def test_the_hopper_kernel_gives_what_the_portable_one_gives(R, C, D, keys, limit, count, dtype, monkeypatch):
    if fused.hopper is None or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("not a Hopper GPU, or another triton than the kernel was written for")
    block = make_block(R, C, D, dtype, keys=keys, limit=limit)
    if keys == 1:  # one key each, as passage ids give
        block = replace(block, keys=tuple((row[:, :1], column) for row, column in block.keys))
    monkeypatch.setattr(fused.hopper, "PROVEN", True)  # this is the proof
    monkeypatch.setattr(fused, "_plan", fused._plan.__wrapped__)  # no plan of the other
    pivot, results = random(R, seed=9).to(DEVICE, torch.float32), []
    for kernel in (fused.hopper, None):
        monkeypatch.setattr(fused, "hopper", kernel)
        counts = torch.zeros(R, 2, dtype=torch.int32, device=DEVICE)
        for _ in range(3):  # another buffer of NaNs for E each time
            torch.full((R, C + 64), float("nan"), dtype=torch.bfloat16, device=DEVICE)
            exp, sums, _ = fused.exp_scores(replace(block, counts=counts if count else None), pivot)
        results.append((exp, sums, counts))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=0)
    assert torch.equal(results[0][2], results[1][2])


@pytest.mark.skipif(fused.hopper is None, reason="another triton than the kernel was written for")
@pytest.mark.skipif(fused.INTERPRETED, reason="nothing compiles in the interpreter")
def test_the_hopper_kernel_compiles_and_fits():
    """Without a GPU; what it computes is tested where there is one. In another process: triton complains at its end."""
    script = Path(__file__).parent / "compile_hopper.py"
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    variants = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(variants) == 3
    for variant in variants:
        assert variant["tensor cores"], variant
        assert variant["shared memory"] <= 227 * 1024, variant


@on_gpu
@pytest.mark.parametrize(("B", "M", "D"), [(1, 1, 8), (63, 189, 40), (256, 2048, 1024), (1000, 8000, 256)])
@pytest.mark.parametrize("masked", [False, True])
def test_small_batches_take_their_own_path_to_the_same_result(B, M, D, masked):
    queries, passages = leaves(B, M, D, torch.bfloat16)
    q, p = (each.detach().double().requires_grad_() for each in (queries, passages))
    own = torch.arange(B, device=DEVICE) * (M // B)
    ids = torch.arange(M, device=DEVICE) % 50 - 1
    same = (ids[own, None] == ids) & (ids[own, None] != -1) & (torch.arange(M, device=DEVICE) != own[:, None])
    false_negatives = FalseNegatives(passage_ids=ids) if masked else None
    truth = F.cross_entropy((q @ p.T / 0.02).masked_fill(same & masked, -math.inf), own)
    (2 * truth).backward()
    for impl in ("auto", "fused", "auto"):
        queries.grad = passages.grad = None
        loss = info_nce(queries, passages, temperature=0.02, impl=impl, false_negatives=false_negatives)
        assert ("Small" in type(loss.grad_fn).__name__) == (impl == "auto")
        (2 * loss).backward()
        assert abs(loss.item() - truth.item()) <= max(2e-5 * truth.item(), 1e-7)
        if M > 1:  # else the gradients are exactly 0
            assert error(queries.grad, q.grad) <= 2.5e-3
            assert error(passages.grad, p.grad) <= 2.5e-3


@on_gpu
@pytest.mark.parametrize("temperature", [0.05, 0.02, 0.01])
def test_bfloat16_gradients_are_as_exact_as_bfloat16(temperature):
    queries, passages = leaves(2048, 8192, 1024, torch.bfloat16)
    info_nce(queries, passages, temperature=temperature, impl="fused").backward()
    q, p = (each.detach().double().requires_grad_() for each in (queries, passages))
    F.cross_entropy(q @ p.T / temperature, torch.arange(2048, device=DEVICE) * 4).backward()
    assert error(queries.grad, q.grad) <= 2.5e-3
    assert error(passages.grad, p.grad) <= 2.5e-3


@on_gpu
@pytest.mark.parametrize("impl", ["auto", "fused"])
def test_the_host_never_waits(impl):
    queries, passages = leaves(512, 2048, 128, torch.bfloat16)
    ids = torch.randint(0, 1000, (2048,), device=DEVICE)
    options = {} if impl == "auto" else {"false_negatives": FalseNegatives(passage_ids=ids)}
    info_nce(queries, passages, impl=impl, **options).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        info_nce(queries, passages, impl=impl, **options).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_memory_is_the_gradients_and_a_chunk():
    queries, passages = leaves(8192, 32768, 256, torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    info_nce(queries, passages, chunk_mib=64).backward()
    peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
    float32_gradients_mib = (8192 + 32768) * 256 * 4 / 2**20
    assert peak_mib <= 64 + 1.6 * float32_gradients_mib + 8  # float32, then bfloat16 as well; and vectors


def test_unusable_inputs_are_refused_by_name():
    queries, passages = torch.randn(2, 4, dtype=torch.float64, device=DEVICE), torch.randn(4, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="float64"):
        info_nce(queries, passages.to(DEVICE), impl="fused")
    if not fused.INTERPRETED:
        with pytest.raises(ValueError, match="CUDA"):
            info_nce(queries.float().cpu(), passages.float(), impl="fused")


class RecordedKernel:
    """Stands for a kernel and for what Triton compiles of it: notes how it was called."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.calls: list[tuple] = []

    def __getitem__(self, grid: tuple):
        def call(*arguments, **options):
            self.calls.append((grid, arguments, options))
            return self

        return call

    def run(self, *arguments):
        self.calls.append(arguments)


def test_a_launch_like_an_earlier_one_asks_triton_for_nothing(monkeypatch):
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: "stream"))
    monkeypatch.setattr(_launch, "driver", driver)
    monkeypatch.setattr(_launch, "INTERPRETED", True)  # asks no GPU for its number
    kernel, first, second = RecordedKernel(), torch.zeros(4), torch.ones(4)
    keys = torch.zeros(2, dtype=torch.int32)
    for tensor, size in ((first, 7), (second, 9), (second, 16)):
        _launch.launch(kernel, 3, (tensor, (keys,), size, 0.5), {"BM": 8}, num_warps=4)
    compiled, again, another_kind = kernel.calls
    assert compiled == ((3,), (first, (keys,), 7, 0.5), {"BM": 8, "num_warps": 4})
    values = second.data_ptr(), (keys.data_ptr(),), 9, 0.5, 8
    assert again == (3, 1, 1, "stream", "function", "metadata", None, None, None, *values)
    assert another_kind[0] == (3,)  # Triton compiles another kernel for a size that 16 divides
    monkeypatch.setattr(_launch.knobs.runtime, "launch_enter_hook", lambda metadata: None)
    _launch.launch(kernel, 3, (second, (keys,), 9, 0.5), {"BM": 8}, num_warps=4)
    assert kernel.calls[-1] == ((3, 1, 1), values, {})  # whoever set a hook is told


def test_the_interface_is_that_of_the_tiled_path():
    names = [name for name in vars(Kernels) if not name.startswith("_")] + ["DEFAULT_CHUNKS", "ROW_MULTIPLE"]
    assert len(names) == 8
    for name in names:
        ours, theirs = getattr(fused, name), getattr(tiled, name)
        assert type(ours) is type(theirs)
        if callable(ours):
            expected = inspect.signature(getattr(Kernels, name))
            assert inspect.signature(ours).parameters.keys() == expected.parameters.keys()
            assert inspect.signature(theirs).parameters.keys() == expected.parameters.keys()


@pytest.mark.skipif(CUDA or fused.INTERPRETED, reason="the tests above run as they are")
def test_in_the_interpreter():
    """The environment variable must be set before triton is imported, hence another process."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-vv", "-x", "-p", "no:cacheprovider", __file__, *LIKE_THIS],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert result.stdout.count("PASSED") > 20
