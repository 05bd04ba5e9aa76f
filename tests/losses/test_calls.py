"""A loss is few calls in few files: the second call of forward and backward, counted by the interpreter."""

import os
import sys

import pytest
import torch
from torch.nn.functional import normalize

import inbatch
from inbatch import FalseNegatives, info_nce

PACKAGE = os.path.dirname(inbatch.__file__)


def count(ids: bool, negatives: str) -> tuple[int, int, int]:
    """Return the calls of functions of ours, their files, and the calls from another file of ours or from outside."""
    queries, passages = (normalize(torch.randn(rows, 16)).requires_grad_() for rows in (8, 16))
    false_negatives = FalseNegatives(torch.arange(16)) if ids else None
    calls, files, crossings = 0, set(), 0

    def profile(frame, event, _):
        nonlocal calls, crossings
        file, caller = frame.f_code.co_filename, frame.f_back
        if event != "call" or not file.startswith(PACKAGE) or frame.f_code.co_name.startswith("<"):
            return
        while caller is not None and not caller.f_code.co_filename.startswith(PACKAGE):
            caller = caller.f_back
        calls, crossings = calls + 1, crossings + (caller is None or caller.f_code.co_filename != file)
        files.add(file)

    info_nce(queries, passages, false_negatives=false_negatives, negatives=negatives).backward()
    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        info_nce(queries, passages, false_negatives=false_negatives, negatives=negatives).backward()
    finally:
        sys.setprofile(before)
    return calls, len(files), crossings


def count_on_rank(rank: int, ids: bool, negatives: str) -> tuple[int, int, int]:
    return count(ids, negatives)


@pytest.mark.parametrize("ids", [False, True])
def test_one_process(ids):
    calls, files, _ = count(ids, "gather")
    assert 20 < calls <= 60
    assert files <= 8


@pytest.mark.parametrize("ids", [False, True])
def test_two_ranks(pool, ids):
    calls, _, crossings = pool.run(count_on_rank, 2, ids, "gather")[0]
    assert 20 < calls <= 90
    assert crossings <= 35
    assert 20 < pool.run(count_on_rank, 2, ids, "ring")[0][0] <= 140
