import random

import torch

from inbatch.losses.masking import FalseNegatives, Keys, compact, mask, match, passage_keys, row_keys, sharing

WIDE = [-(2**63), 2**63 - 1, 2**32, 2**33, 0, 1, 2**40 + 1]  # several agree in their lower 32 bits


def dense(pairs, num_rows: int, num_columns: int) -> torch.Tensor:
    """What a kernel makes of compacted keys: plain equality, nothing else."""
    masked = torch.zeros(num_rows, num_columns, dtype=torch.bool)
    for rows, columns in pairs:
        masked |= (rows[:, None, :, None] == columns[None, :, None, :]).any(3).any(2)
    return masked


def test_compaction_keeps_exactly_the_matches():
    rng = random.Random(0)
    for _ in range(200):
        r, c, k, width = rng.randint(0, 6), rng.randint(0, 6), rng.randint(1, 3), rng.randint(1, 3)
        rows = torch.tensor([[rng.choice([-1, *WIDE]) for _ in range(k)] for _ in range(r)], dtype=torch.int64)
        columns = torch.tensor([[rng.choice([-1, *WIDE]) for _ in range(width)] for _ in range(c)], dtype=torch.int64)
        rows, columns = rows.view(r, k), columns.view(c, width)
        keys = Keys(documents=rows), Keys(documents=columns)
        pairs = match(*keys)
        assert all(each.dtype == torch.int32 for pair in pairs for each in pair)
        expected = [
            [bool((set(row) - {-1}) & (set(column) - {-1})) for column in columns.tolist()] for row in rows.tolist()
        ]
        expected = torch.tensor(expected, dtype=torch.bool).view(r, c)
        assert torch.equal(dense(pairs, r, c), expected)
        assert torch.equal(mask(*keys, r, c, device=torch.device("cpu")), expected)


def test_a_key_that_no_column_has_meets_nothing():
    rows, columns = compact(torch.tensor([[7], [-1], [5]]), torch.tensor([[5], [-1], [9]]))
    assert not (rows[:2] == columns.T).any()
    assert (rows[2] == columns.flatten()).tolist() == [True, False, False]


def test_query_ids_of_rows_that_share_a_positive():
    # Rows 0 and 1 share passage 2; query 10 was asked again in row 2, whose positive is passage 0.
    ids = FalseNegatives(query_ids=torch.tensor([10, 11, 10, 11]))
    positives = torch.tensor([2, 2, 0, 1])
    assert sharing(positives) == 2
    rows = row_keys(ids, positives, 0)
    columns = passage_keys(ids, positives, 4, sharing(positives))
    masked = mask(rows, columns, 4, 4, device=torch.device("cpu"))
    assert masked.int().tolist() == [[1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 1, 0], [0, 1, 1, 0]]
    assert torch.equal(dense(match(rows, columns), 4, 4), masked)


def test_documents_known_positives_and_padding():
    ids = FalseNegatives(
        passage_ids=torch.tensor([5, 6, -1, 5]),
        positive_ids=torch.tensor([[6, -1], [-1, -1]]),
    )
    rows = row_keys(ids, torch.tensor([0, 2]), 3)
    assert rows.documents is not None
    assert rows.documents.shape == (2, 4)
    masked = mask(rows, passage_keys(ids, torch.tensor([0, 2]), 4, 1), 2, 4, device=torch.device("cpu"))
    # The row's own positive matches too; it is the own-column rule, not the keys, that keeps it in.
    assert masked.int().tolist() == [[1, 1, 0, 1], [0, 0, 0, 0]]


def test_sharing_of_none_and_of_nothing():
    assert sharing(None) == 1
    assert sharing(torch.zeros(0, dtype=torch.int64)) == 1
    assert sharing(torch.tensor([3, 1, 3, 3])) == 3
