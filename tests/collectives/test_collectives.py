import contextlib
import os
import random
import socket
import subprocess
import sys
import time
import warnings

import pytest
import torch
import torch.distributed as dist

from inbatch import collectives
from inbatch.collectives import agree, all_gather, ring_shift
from tests.helpers import REPOSITORY, device


@contextlib.contextmanager
def nan_in_fresh_buffers():
    """What a collective forgets to write, or reads without need, then shows."""
    set_mode = torch._C._set_deterministic_algorithms  # the public function imports the whole of inductor first
    set_mode(True)
    try:
        yield
    finally:
        set_mode(False)


def rank_tensor(rank, rows, *tail, dtype=torch.float64):
    """What rank `rank` holds: any rank can build every rank's, and so the truth."""
    generator = torch.Generator().manual_seed(1000 + rank)
    return torch.randn(rows, *tail, generator=generator, dtype=torch.float64).to(device(), dtype)


def raised(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except (ValueError, RuntimeError) as error:
        return type(error).__name__, str(error)
    return None


# ---- the gather and its gradient


def gather_cases(world_size):
    rng = random.Random(world_size)
    edge = [[0] * world_size, [1] * world_size, [0] * (world_size - 1) + [3], [63, 0, 1, 5][:world_size]]
    return edge + [[rng.choice([0, 1, 2, 7]) for _ in range(world_size)] for _ in range(3)]


def gather_body(rank, cases):
    for rows in cases:
        for tail in [(), (3,), (2, 0), (2, 5)]:
            for agreed in (None, rows):
                parts = [rank_tensor(r, n, *tail).requires_grad_() for r, n in enumerate(rows)]
                with nan_in_fresh_buffers():
                    gathered = all_gather(parts[rank], rows=agreed)
                    # Each rank weighs the result differently, as each has its own queries.
                    weights = [rank_tensor(100 + r, sum(rows), *tail) for r in range(len(rows))]
                    (gathered * weights[rank]).sum().backward()
                truth = torch.cat([part.detach() for part in parts])
                assert torch.equal(gathered.detach(), truth)
                expected = sum(weights).split(rows)[rank]
                torch.testing.assert_close(parts[rank].grad, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_gather_is_the_concatenation_and_its_gradient_the_sum_over_ranks(pool, world_size):
    pool.run(gather_body, world_size, gather_cases(world_size))


DTYPES = [torch.bool, torch.int16, torch.int64, torch.uint8, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


def dtypes_body(rank):
    for dtype in [*DTYPES, torch.complex64]:
        for rows in ([2, 2, 2], [0, 3, 1]):
            parts = [(10 * rank_tensor(r, n, 3)).to(dtype) for r, n in enumerate(rows)]
            gathered = all_gather(parts[rank])
            assert gathered.dtype == dtype
            assert (
                gathered.tolist()
                == torch.cat([part.float() if dtype.itemsize == 1 else part for part in parts]).tolist()
            )
            assert not gathered.requires_grad


def test_gather_takes_every_dtype(pool):
    pool.run(dtypes_body, 3)


def strided_body(rank):
    parts = [rank_tensor(r, 4, 6).requires_grad_() for r in range(2)]
    gathered = all_gather(parts[rank].t()[::2])
    assert torch.equal(gathered, torch.cat([part.t()[::2] for part in parts]))
    gathered.sum().backward()  # its gradient is an expanded scalar: not contiguous either
    expected = torch.zeros(4, 6, dtype=torch.float64, device=device())
    expected[:, ::2] = 2
    assert torch.equal(parts[rank].grad, expected)


def test_gather_of_strided_tensors(pool):
    pool.run(strided_body, 2)


def half_gradient_body(rank, dtype, rows):
    part = torch.ones(rows[rank], 2, dtype=dtype, device=device(), requires_grad=True)
    # 2^k + 1 + 1 is 2^k for an accumulator of this dtype, and 2^k + 2 in float32.
    unit = 2 / torch.finfo(dtype).eps
    weights = torch.full((sum(rows), 2), unit if rank == 0 else 1 if rank < 3 else 0, dtype=dtype, device=device())
    (all_gather(part) * weights).sum().backward()
    assert part.grad.dtype == dtype
    assert (part.grad == unit + 2).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [[1, 1, 1, 1], [2, 0, 1, 3]])
def test_half_precision_gradients_are_summed_in_float32(pool, dtype, rows):
    # float16: 2 / eps = 2048
    pool.run(half_gradient_body, 4, dtype, rows)


def no_grad_body(rank):
    part = rank_tensor(rank, 2).requires_grad_()
    with torch.no_grad():
        assert not all_gather(part).requires_grad
    assert not all_gather(part.detach()).requires_grad


def test_gather_without_gradient(pool):
    pool.run(no_grad_body, 2)


def test_one_process_gets_its_own_tensor_back():
    tensor = torch.randn(3, 2, requires_grad=True)
    assert all_gather(tensor) is tensor
    assert collectives.reduce_scatter_rows(tensor, [3]) is tensor
    assert collectives.all_reduce(tensor) is tensor
    assert ring_shift([tensor], [3]).wait()[0] is tensor
    assert collectives.gather_objects("x") == ["x"]
    assert collectives.broadcast_object("x") == "x"
    assert collectives.together(lambda: 5) == 5
    assert agree("call", {"t": tensor, "none": None}, ragged=["t"]) == {"t": [3], "t, dim 1": [2]}
    assert (collectives.world_size(), collectives.rank()) == (1, 0)
    with pytest.raises(ValueError, match="0-d"):
        all_gather(torch.tensor(1.0))
    with pytest.raises(ValueError, match="mine"):
        agree("call", {}, error="mine")


def reduce_scatter_body(rank):
    for dtype, rows in [(torch.int64, [2, 2, 2]), (torch.float32, [0, 3, 1]), (torch.float64, [0, 0, 0])]:
        tensors = [(10 * rank_tensor(r, sum(rows), 3)).round().to(dtype) for r in range(3)]
        with nan_in_fresh_buffers():
            own = collectives.reduce_scatter_rows(tensors[rank], rows)
        assert torch.equal(own, sum(tensors).split(rows)[rank])


def test_reduce_scatter_rows(pool):
    pool.run(reduce_scatter_body, 3)


# ---- the agreement


def agree_body(rank):
    tensor = torch.zeros(rank, 4 + rank, 5, device=device())
    fields = {"a": torch.zeros(3 - rank, 2, device=device()), "absent": None, "b": tensor, "scalar": tensor.sum()}
    counts = agree("call", fields, ragged=("b",), same={"temperature": 0.02, "impl": "auto", "x": None, "flag": True})
    assert counts == {"a": [3, 2, 1], "b": [0, 1, 2], "scalar": [1, 1, 1], "b, dim 1": [4, 5, 6]}


def test_agreement_returns_the_sizes_by_rank(pool):
    pool.run(agree_body, 3)


def _ones(*shape, **kwargs):
    return torch.ones(*shape, device=device(), **kwargs)


DISAGREEMENTS = {
    # case: (what rank 2 does, what the others do, what the message says)
    "presence": ({"t": None}, {"t": (5, 8)}, "t: ranks 0, 1 have (rows, 8) float32, rank 2 has None"),
    "trailing shape": ({"t": (5, 8)}, {"t": (8, 4)}, "t: ranks 0, 1 have (rows, 4) float32, rank 2 has (rows, 8)"),
    "dimensions": ({"t": (5,)}, {"t": (5, 1)}, "rank 2 has (rows) float32"),
    "0-d": ({"t": ()}, {"t": (5,)}, "rank 2 has () float32"),
    "dtype": ({"t": (5, 8), "dtype": torch.bfloat16}, {"t": (5, 8)}, "rank 2 has (rows, 8) bfloat16"),
    "requires_grad": ({"t": (5, 8), "grad": True}, {"t": (5, 8)}, "rank 2 has (rows, 8) float32 requiring grad"),
    "value": ({"t": (5, 8), "same": {"k": 2}}, {"t": (5, 8), "same": {"k": 1}}, "k: ranks 0, 1 have 1, rank 2 has 2"),
    "names": ({"t": (5,), "same": {"k": 2}}, {"t": (5,)}, "k: ranks 0, 1 have nothing of that name, rank 2 has 2"),
    "call": ({"t": (5,), "what": "search"}, {"t": (5,)}, "different calls: ranks 0, 1 have loss, rank 2 has search"),
    "device": ({"t": (5, 8), "device": "meta"}, {"t": (5, 8)}, "rank 2: t is on meta but the process group only"),
    "mistake": ({"t": (5, 8), "error": "no file x"}, {"t": (5, 8)}, "rank 2: no file x"),
}  # fmt: skip


def disagreement_body(rank):
    messages = {}
    for name, (odd, usual, _) in DISAGREEMENTS.items():
        case = dict(odd if rank == 2 else usual)
        shape, grad = case.pop("t"), case.pop("grad", False)
        dtype, what = case.pop("dtype", torch.float32), case.pop("what", "loss")
        tensor = (
            None if shape is None else _ones(shape, dtype=dtype, requires_grad=grad).to(case.pop("device", device()))
        )
        messages[name] = raised(agree, what, {"t": tensor}, **case)
    # None of these leaves the group unusable.
    assert agree("end", {"t": _ones(rank)}) == {"t": [0, 1, 2]}
    return messages


def test_disagreement_raises_the_same_error_on_every_rank(pool):
    results = pool.run(disagreement_body, 3)
    assert results[0] == results[1] == results[2]
    for name, (_, _, expected) in DISAGREEMENTS.items():
        kind, message = results[0][name]
        assert (kind, expected in message) == ("ValueError", True), (name, message)


def gather_disagreement_body(rank):
    return [
        raised(all_gather, _ones(3, 2 + rank)),
        raised(all_gather, _ones(3, requires_grad=rank == 0)),
        raised(all_gather, _ones(3).sum() if rank else _ones(3)),
    ]


def test_gather_checks_before_it_gathers(pool):
    first, second = pool.run(gather_disagreement_body, 2)
    assert first == second
    assert all(kind == "ValueError" for kind, _ in first)
    assert [part in message for part, (_, message) in zip(["(rows, 3)", "requires_grad", "0-d"], first, strict=True)]


def wrong_rows_body(rank):
    return [raised(all_gather, _ones(2), rows=rows) for rows in ([1, 1], [2, 2, 2], [])]


def test_gather_refuses_rows_that_are_not_so(pool):
    for results in pool.run(wrong_rows_body, 2):
        assert all(kind == "ValueError" and "do not fit" in message for kind, message in results)


# ---- groups


def mesh_body(rank):
    columns = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    group, other, place = columns[rank % 2], columns[1 - rank % 2], rank // 2
    assert (collectives.world_size(group), collectives.rank(group)) == (2, place)
    rows = [3, 1]
    parts = [rank_tensor(rank % 2 + 2 * r, n, 2).requires_grad_() for r, n in enumerate(rows)]
    gathered = all_gather(parts[place], group)
    assert torch.equal(gathered, torch.cat(parts))
    gathered.sum().backward()
    assert (parts[place].grad == 2).all()  # two ranks in the group, not four
    (received,) = ring_shift([parts[place].detach()], rows, group).wait()
    assert torch.equal(received, parts[1 - place])
    assert collectives.gather_objects(rank, group) == [rank % 2, rank % 2 + 2]
    assert collectives.broadcast_object(rank, src=1, group=group) == rank % 2 + 2
    assert collectives.all_reduce(_ones(1), group=group).item() == 2
    collectives.barrier(group)
    return raised(all_gather, parts[place], other)


def test_subgroups_of_a_mesh(pool):
    for error in pool.run(mesh_body, 4):
        assert error is not None
        assert "not a member" in error[1]


# ---- the ring


def ring_body(rank, rows, size):
    tensors = [[rank_tensor(r, n, size), torch.arange(n, device=device()) + r] for r, n in enumerate(rows)]
    held, counts = tensors[rank], rows
    for step in range(1, len(rows) + 1):
        with nan_in_fresh_buffers():
            shift = ring_shift(held, counts)
            torch.ones(64, 64) @ torch.ones(64, 64)
            held = shift.wait()
        counts = [counts[r - 1] for r in range(len(rows))]
        for tensor, expected in zip(held, tensors[(rank - step) % len(rows)], strict=True):
            assert torch.equal(tensor, expected)


@pytest.mark.parametrize("rows", [[3, 3], [2, 0, 5], [0, 0, 1, 4]])
def test_ring_carries_several_uneven_tensors_all_the_way_round(pool, rows):
    pool.run(ring_body, len(rows), rows, 100_000)


def overlapping_ring_body(rank):
    # As in a ring loss: while columns are on their way, gradients are sent too, and waited for in another order.
    for repeat in range(30):
        rows = [(5 * repeat) % 7, 3, 20][: collectives.world_size()]
        columns = [rank_tensor(r, n, 1000) for r, n in enumerate(rows)]
        gradients = [-rank_tensor(r, n, 10) for r, n in enumerate(rows)]
        first, second = ring_shift([columns[rank]], rows), ring_shift([gradients[rank], columns[rank] + 1], rows)
        received = second.wait() + first.wait()
        expected = [gradients[rank - 1], columns[rank - 1] + 1, columns[rank - 1]]
        assert all(torch.equal(a, b) for a, b in zip(received, expected, strict=True))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ring_shifts_may_overlap(pool, world_size):
    pool.run(overlapping_ring_body, world_size)


# ---- control


def together_body(rank):
    def fails(kinds):
        def function():
            if rank in kinds:
                raise kinds[rank](f"broken at {rank}")
            return rank

        return function

    assert collectives.together(fails({})) == rank
    return [raised(collectives.together, fails(kinds)) for kinds in ({1: ValueError}, {1: RuntimeError, 2: ValueError})]


def test_together_raises_everywhere_and_keeps_own_errors(pool):
    zero, one, two = pool.run(together_body, 3)
    assert zero == [
        ("ValueError", "rank 1: broken at 1"),
        ("OtherRankError", "rank 1: RuntimeError: broken at 1; rank 2: broken at 2"),
    ]
    assert one == [("ValueError", "broken at 1"), ("RuntimeError", "broken at 1")]
    assert two == [("ValueError", "rank 1: broken at 1"), ("ValueError", "broken at 2")]


def quiet_body(rank):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        part = _ones(2, 3, requires_grad=True)
        all_gather(part).sum().backward()
        ring_shift([part.detach()], [2, 2]).wait()
        collectives.all_reduce(_ones(1), "max")
        collectives.broadcast_object({"a": rank})
        raised(agree, "call", {}, error="mine")


def test_no_warning_from_torch(pool):
    pool.run(quiet_body, 2)


# ---- torch.compile


TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])
NEEDS_FLAG = {"capture_dynamic_output_shape_ops": True} if TORCH < (2, 13) else {}


def compiled_body(rank, backend, rows, agreed):
    group = dist.new_group([0, 1])

    def loss(part, weights):
        gathered = all_gather(part * 2, group, rows=rows if agreed else None)
        return (gathered * weights).sum() + all_gather(weights).sum()

    part = rank_tensor(rank, rows[rank], 3).requires_grad_()
    weights = rank_tensor(rank, 1, 3)
    expected = loss(part, weights)
    (gradient,) = torch.autograd.grad(expected, part)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(NEEDS_FLAG):
        value = torch.compile(loss, fullgraph=True, backend=backend)(part, weights)
    value.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(part.grad, gradient)


@pytest.mark.parametrize("rows", [[2, 2], [4, 2], [3, 0]])
@pytest.mark.parametrize("agreed", [True, False])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_gather_inside_torch_compile_breaks_no_graph(pool, backend, rows, agreed):
    pool.run(compiled_body, 2, backend, rows, agreed)


def test_gather_inside_inductor(pool):
    pool.run(compiled_body, 2, "inductor", [3, 2], False, timeout_s=180)


# ---- start and stop

CHILD = """
import torch
from inbatch import collectives
device = collectives.start(backend="gloo", timeout_s=60)
assert device == collectives.device() == torch.device("cpu")
print(collectives.rank(), collectives.world_size(), collectives.all_gather(torch.tensor([collectives.rank()])).tolist())
collectives.stop()
assert collectives.world_size() == 1
"""


def test_start_reads_torchruns_environment():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )
        for rank in range(2)
    ]
    printed = [child.communicate(timeout=120)[0].splitlines()[-1] for child in children]
    assert printed == ["0 2 [0, 1]", "1 2 [0, 1]"]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "MASTER_ADDR is not"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_PORT": "1", "MASTER_ADDR": "x"}, "0 <= RANK < WORLD_SIZE"),
    ],
)
def test_half_an_environment_is_an_error(monkeypatch, environment, message):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        collectives.start(backend="gloo")


# ---- the pool itself


def failing_body(rank, kind):
    if rank == 1:
        if kind == "raises":
            raise KeyError("a reason")
        if kind == "dies":
            os._exit(3)
        time.sleep(1000)
    return rank


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("raises", "--- rank 1 ---\n.*a reason"),
        ("dies", "--- rank 1 ---\ndied with exit code 3"),
        ("hangs", "--- rank 1 ---\nno answer within 2 s:\n.* in failing_body"),
    ],
)
def test_pool_reports_what_fails_and_recovers(pool, kind, message):
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        pool.run(failing_body, 2, kind, timeout_s=2)
    assert pool.run(failing_body, 1, kind) == [0]
    assert pool.run(agree_body, 3) == [None] * 3
