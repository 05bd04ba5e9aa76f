import inspect

import pytest
import torch
import torch.nn.functional as F

from inbatch.inbatch_neg_utils import (
    _all_gather_tensor,
    dist_gather_tensor,
    dist_gather_tensor_with_dim1_padding,
    mask_gathered_passages_same_doc_as_positive,
    positive_columns,
)
from tests.collectives.test_collectives import nan_in_fresh_buffers, raised, rank_tensor
from tests.helpers import device

GATHERS = [_all_gather_tensor, dist_gather_tensor, dist_gather_tensor_with_dim1_padding]


def test_signatures():
    def parameters(function):
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    required = inspect.Parameter.empty
    assert parameters(_all_gather_tensor) == [("t", required), ("preserve_grad", False)]
    assert parameters(dist_gather_tensor) == [("t", required), ("preserve_grad", False)]
    assert parameters(dist_gather_tensor_with_dim1_padding) == [
        ("t", required),
        ("padding_value", 0),
        ("preserve_grad", False),
    ]
    assert [name for name, _ in parameters(mask_gathered_passages_same_doc_as_positive)] == [
        "scores",
        "passage_doc_ids",
        "train_n_passages",
        "rank",
        "local_batch_size",
    ]


@pytest.mark.parametrize("gather", GATHERS)
def test_one_process_gets_the_very_same_object(gather):
    for tensor in (torch.ones(2, 3), torch.ones(2, 3, requires_grad=True), torch.tensor(1)):
        assert gather(tensor) is tensor
        assert gather(tensor, preserve_grad=True) is tensor


def one_process_group_body(rank):
    tensor = torch.ones(2, 3)
    return all(gather(tensor) is tensor for gather in GATHERS)


def test_a_group_of_one_gets_the_very_same_object(pool):
    assert pool.run(one_process_group_body, 1) == [True]


def none_body(rank):
    return [dist_gather_tensor(None), dist_gather_tensor_with_dim1_padding(None, preserve_grad=True)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_none_in_none_out(pool, world_size):
    assert pool.run(none_body, world_size) == [[None, None]] * world_size
    assert none_body(0) == [None, None]


# ---- gathers between processes


def gradient_body(rank, rows, preserve_grad):
    for gather in GATHERS:
        parts = [rank_tensor(r, n, 3).requires_grad_() for r, n in enumerate(rows)]
        weights = [rank_tensor(10 + r, sum(rows), 3) for r in range(len(rows))]
        with nan_in_fresh_buffers():
            gathered = gather(parts[rank] * 2, preserve_grad=preserve_grad)
        assert torch.equal(gathered, torch.cat([part * 2 for part in parts]))
        (gathered * weights[rank]).sum().backward()
        seen = sum(weights) if preserve_grad else weights[rank]
        torch.testing.assert_close(parts[rank].grad, 2 * seen.split(rows)[rank])


@pytest.mark.parametrize("rows", [[2, 2], [3, 0, 1], [1, 1, 1, 1]])
@pytest.mark.parametrize("preserve_grad", [False, True])
def test_gradient_is_own_slice_or_sum_over_ranks(pool, rows, preserve_grad):
    pool.run(gradient_body, len(rows), rows, preserve_grad)


def detached_body(rank):
    ids = torch.arange(2, device=device()) + 10 * rank
    mask = torch.tensor([[True, False], [False, rank == 1]], device=device())
    for preserve_grad in (False, True):
        gathered = dist_gather_tensor(ids, preserve_grad)
        assert (gathered.tolist(), gathered.requires_grad) == ([0, 1, 10, 11], False)
        gathered = dist_gather_tensor(mask, preserve_grad)
        assert gathered.dtype == torch.bool
        assert gathered.tolist() == [[True, False], [False, False], [True, False], [False, True]]
        assert not dist_gather_tensor(rank_tensor(rank, 2, 3), preserve_grad).requires_grad


def test_ids_masks_and_constants_are_gathered_detached(pool):
    pool.run(detached_body, 2)


def padding_body(rank):
    lengths, rows = [2, 0, 4], [1, 2, 0]  # the longest is on a rank without rows
    for value, dtype in [(0, torch.int64), (7, torch.int32), (-1.5, torch.float64), (True, torch.bool)]:
        for tail in [(), (3,)]:
            parts = [rank_tensor(r, rows[r], lengths[r], *tail).to(dtype) for r in range(3)]
            gathered = dist_gather_tensor_with_dim1_padding(parts[rank], value)
            expected = torch.full((3, 4, *tail), value, dtype=dtype, device=device())
            expected[:1, :2] = parts[0]
            assert torch.equal(gathered, expected)
    same_length = rank_tensor(rank, 2, 3)
    assert torch.equal(dist_gather_tensor_with_dim1_padding(same_length), dist_gather_tensor(same_length))


def test_dim_1_is_padded_on_the_right_to_the_longest_rank(pool):
    pool.run(padding_body, 3)


def padded_gradient_body(rank, preserve_grad):
    part = rank_tensor(rank, 2, 1 + rank, 3).requires_grad_()
    gathered = dist_gather_tensor_with_dim1_padding(part, preserve_grad=preserve_grad)
    (gathered.sum() * (rank + 1)).backward()
    assert (part.grad == (3 if preserve_grad else rank + 1)).all()


@pytest.mark.parametrize("preserve_grad", [False, True])
def test_gradient_through_the_padding(pool, preserve_grad):
    pool.run(padded_gradient_body, 2, preserve_grad)


def mistakes_body(rank):
    def on(device_rank, odd, usual):
        return odd if rank == device_rank else usual

    ones = torch.ones(2, 3, device=device())
    padded = dist_gather_tensor_with_dim1_padding
    return {
        "None": raised(dist_gather_tensor, on(1, None, ones)),
        "bfloat16": raised(dist_gather_tensor, on(1, ones.bfloat16(), ones)),
        "(rows, 4)": raised(_all_gather_tensor, on(0, torch.ones(2, 4, device=device()), ones)),
        "requiring grad": raised(dist_gather_tensor, on(2, ones.clone().requires_grad_(), ones), True),
        "preserve_grad": raised(dist_gather_tensor, ones.clone().requires_grad_(), rank == 0),
        "got shape ()": raised(dist_gather_tensor, on(0, ones.sum(), ones)),
        "got shape (2,)": raised(padded, on(1, ones[:, 0], ones)),
        "(rows, length, 4)": raised(padded, torch.ones(2, 3, on(1, 4, 5), device=device())),
        "got list": raised(dist_gather_tensor, on(1, [1.0], ones)),
        "does not fit dtype": raised(padded, on(1, ones.long(), ones.long()), on(1, float("inf"), 0)),
        "different calls": raised(on(1, padded, dist_gather_tensor), ones),
    }


def test_mistakes_raise_the_same_clear_error_on_every_rank(pool):
    results = pool.run(mistakes_body, 3)
    assert results[0] == results[1] == results[2]
    for expected, found in results[0].items():
        assert found is not None, expected
        assert (found[0], expected in found[1]) == ("ValueError", True), found


# ---- labels


def labels_body(rank, rows, n):
    """Cross-entropy over gathered passages with these labels = one process with all rows, for any split."""
    starts = [sum(rows[:r]) for r in range(len(rows) + 1)]
    total, mine = starts[-1], slice(starts[rank], starts[rank + 1])
    queries = rank_tensor(7, total, 3).double().requires_grad_()
    passages = rank_tensor(8, total * n, 3).double().requires_grad_()
    labels = torch.arange(total, device=device()) * n
    expected = torch.autograd.grad(F.cross_entropy(queries @ passages.T, labels), (queries, passages))
    gathered = dist_gather_tensor(passages[mine.start * n : mine.stop * n], preserve_grad=True)
    own = positive_columns(rows[rank], n, device())
    assert own.tolist() == labels[mine].tolist()
    loss = F.cross_entropy(queries[mine] @ gathered.T, own, reduction="sum") / total
    found = torch.autograd.grad(loss, (queries, passages))
    for gradient, whole in zip(found, expected, strict=True):
        torch.testing.assert_close(dist_gather_tensor(gradient[None]).sum(0), whole)


@pytest.mark.parametrize("rows", [[2, 2], [8, 4], [3, 0, 1]])
def test_positive_columns_are_the_labels_of_any_split(pool, rows):
    for n in (1, 3):
        pool.run(labels_body, len(rows), rows, n)
    assert positive_columns(3, 2).tolist() == [0, 2, 4]


def wrong_labels_body(rank):
    return [
        raised(positive_columns, 2, 1 + rank),
        raised(positive_columns, 2 - 3 * rank, 1),
        raised(positive_columns, 2, -rank),
    ]


def test_positive_columns_that_cannot_be_are_refused_on_every_rank(pool):
    results = pool.run(wrong_labels_body, 2)
    assert results[0] == results[1]
    for (kind, message), expected in zip(results[0], ("train_n_passages", "got -1 and 1", "got 2 and "), strict=True):
        assert (kind, expected in message) == ("ValueError", True), message


def uneven_mask_body(rank, rows):
    scores = torch.zeros(rows[rank], sum(rows), device=device())
    ids = torch.arange(sum(rows), device=device())
    return raised(mask_gathered_passages_same_doc_as_positive, scores, ids, 1, rank, rows[rank])


@pytest.mark.parametrize("rows", [[8, 4], [6, 5, 1], [4, 2, 2], [2, 1, 1, 0]])
def test_the_mask_notices_ranks_that_are_not_equal(pool, rows):
    found = pool.run(uneven_mask_body, len(rows), rows)
    assert any(error and error[0] == "ValueError" and "info_nce" in error[1] for error in found), found
    equal = [2] * len(rows)
    assert pool.run(uneven_mask_body, len(rows), equal) == [None] * len(rows)


# ---- the mask


def naive_mask(scores, ids, train_n_passages, rank, local_batch_size):
    masked = scores.clone()
    for i in range(local_batch_size):
        positive = (rank * local_batch_size + i) * train_n_passages
        for j in range(scores.shape[1]):
            if j != positive and ids[j] == ids[positive]:
                masked[i, j] = torch.finfo(scores.dtype).min
    return masked


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_mask_hides_the_positives_document_elsewhere(dtype):
    generator = torch.Generator().manual_seed(0)
    for world_size, local, n in [(1, 1, 1), (2, 3, 1), (3, 2, 4), (2, 0, 2)]:
        for rank in range(world_size):
            columns = world_size * local * n
            scores = torch.randn(local, columns, generator=generator).to(dtype)
            ids = torch.randint(-1, 4, (columns,), generator=generator)
            expected = naive_mask(scores, ids, n, rank, local)
            assert mask_gathered_passages_same_doc_as_positive(scores, ids, n, rank, local) is None
            assert torch.equal(scores, expected)


def test_mask_lets_gradient_through_what_it_keeps_and_none_through_what_it_hides():
    leaf = torch.zeros(2, 4, requires_grad=True)
    scores = leaf * 2
    mask_gathered_passages_same_doc_as_positive(scores, torch.tensor([5, 6, 5, 5]), 2, 0, 2)
    assert scores[:, 0].tolist() == [0, torch.finfo(torch.float32).min]
    scores.logsumexp(1).sum().backward()
    expected = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]])  # 2 * softmax over the two kept columns
    torch.testing.assert_close(leaf.grad, expected)


def test_mask_of_a_view_reaches_the_whole():
    whole = torch.zeros(4, 4)
    mask_gathered_passages_same_doc_as_positive(whole[2:], torch.tensor([1, 2, 1, 3]), 1, 1, 2)
    assert (whole == torch.finfo(torch.float32).min).nonzero().tolist() == [[2, 0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(2)}, r"scores must be .*got \(2,\)"),
        ({"scores": torch.zeros(2, 8, dtype=torch.int64)}, "floating point"),
        ({"passage_doc_ids": torch.zeros(7, dtype=torch.int64)}, r"passage_doc_ids must be \[8\].*got \(7,\)"),
        ({"passage_doc_ids": torch.zeros(8, 1, dtype=torch.int64)}, r"got \(8, 1\)"),
        ({"passage_doc_ids": torch.zeros(8)}, "torch.int64.*got.*float32"),
        ({"train_n_passages": 0}, "train_n_passages must be"),
        ({"train_n_passages": 3}, "divide the 8 columns"),
        ({"rank": 2}, "needs 12 columns, scores has 8"),
        ({"rank": -1}, "rank -1"),
        ({"local_batch_size": 3}, "local_batch_size is 3 but scores has 2 rows"),
    ],
)
def test_mask_refuses_what_does_not_fit(change, message):
    fits = {
        "scores": torch.zeros(2, 8),
        "passage_doc_ids": torch.arange(8),
        "train_n_passages": 2,
        "rank": 1,
        "local_batch_size": 2,
    }
    mask_gathered_passages_same_doc_as_positive(**fits)
    with pytest.raises(ValueError, match=message):
        mask_gathered_passages_same_doc_as_positive(**fits | change)
