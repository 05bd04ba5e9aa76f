"""Ranks that do different things are told so at the next agreement, instead of waiting for one another."""

import pytest
import torch

from inbatch import GradCache, collectives, info_nce
from tests.helpers import device


def step_of(encode, modules=()) -> GradCache:
    return GradCache(
        encode, lambda q, p: info_nce(q, p, temperature=0.1), modules=list(modules), micro_batch_tokens=None
    )


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"x": torch.ones(2, 4, device=device())} for _ in range(2)]


OTHER_CALLS = {
    "barrier": collectives.barrier,
    "gather_objects": lambda: collectives.gather_objects("x"),
    "together": lambda: collectives.together(lambda: None),
    "broadcast_object": lambda: collectives.broadcast_object("x"),
}


def other_calls_body(rank):
    rows = torch.ones(2, 4, device=device())
    for name, call in OTHER_CALLS.items():
        with pytest.raises(ValueError, match=f"different calls: rank 0 has info_nce, rank 1 has {name}"):
            info_nce(rows, rows, temperature=0.1) if rank == 0 else call()


def test_control_calls_beside_the_loss(pool):
    pool.run(other_calls_body, 2)


def reduce_body(rank):
    net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 3).to(device()))
    step = step_of(lambda batch: net(batch["x"]), [net])
    with pytest.raises(ValueError, match="GradCache's reduce: rank 0 has True, rank 1 has False"):
        step(*batches(), reduce=rank == 0)
    net.zero_grad()
    step_of(lambda batch: net(batch["x"]), [net])(*batches(), reduce=True)
    gathered = collectives.gather_objects(net.module.weight.grad.tolist())
    assert gathered[0] == gathered[1]


def test_a_rank_that_does_not_reduce(pool):
    pool.run(reduce_body, 2)


def caught_error_body(rank):
    weight = torch.nn.Linear(4, 3).to(device())
    fails = [rank == 1]

    def encode(batch):
        if fails.pop() if fails else False:
            raise ArithmeticError("mine")
        return weight(batch["x"])

    step = step_of(encode)
    if rank == 1:
        with pytest.raises(ArithmeticError):
            step(*batches(), reduce=False)
    with pytest.raises(ValueError, match="GradCache's failed steps: rank 0 has 0, rank 1 has 1"):
        step(*batches(), reduce=False)


def test_a_rank_that_catches_its_own_error(pool):
    pool.run(caught_error_body, 2)


def skipped_step_body(rank):
    with (
        pytest.raises(ValueError, match=r"together: .* step: rank 0 has 3, rank 1 has 4"),
        collectives.agreeing_on(step=3 + rank),
    ):
        collectives.together(lambda: None)
    collectives.barrier()


def test_a_rank_that_skips_a_step(pool):
    pool.run(skipped_step_body, 2)
