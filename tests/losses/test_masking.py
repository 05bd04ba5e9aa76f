import random

import torch

from inbatch.losses.masking import (
    FalseNegatives,
    Keys,
    mask,
    match,
    passage_keys,
    positives_by_query,
    row_keys,
    sharing,
)

CPU = torch.device("cpu")

WIDE = [-(2**63), 2**63 - 1, 2**32, 2**33, 0, 1, 2**40 + 1]  # several agree in their lower 32 bits


def keys(rng: random.Random, number: int, width: int) -> torch.Tensor:
    values = [[rng.choice([-1, *WIDE]) for _ in range(width)] for _ in range(number)]
    return torch.tensor(values, dtype=torch.int64).view(number, width)


def test_equal_keys_mask_and_unknown_ones_never_do():
    rng = random.Random(0)
    for _ in range(200):
        r, c = rng.randint(0, 6), rng.randint(0, 6)
        rows, columns = keys(rng, r, rng.randint(1, 3)), keys(rng, c, rng.randint(1, 3))
        pairs = match(Keys(documents=rows), Keys(documents=columns))
        expected = [
            [bool((set(row) - {-1}) & (set(column) - {-1})) for column in columns.tolist()] for row in rows.tolist()
        ]
        assert torch.equal(mask(pairs, r, c, CPU), torch.tensor(expected, dtype=torch.bool).view(r, c))


def test_the_documents_of_a_query_are_the_positives_of_all_its_rows():
    rng = random.Random(1)
    for _ in range(100):
        rows = [(rng.choice([-1, 3, 4, 5]), rng.choice([-1, 7, 8, 9])) for _ in range(rng.randint(0, 8))]
        pairs = torch.tensor(rows, dtype=torch.int64).view(len(rows), 2)
        found = positives_by_query(pairs[:, 0], pairs)
        most = max((sum(q == query for q, _ in rows) for query, _ in rows if query != -1), default=0)
        if most < 2:
            assert found is None
            continue
        assert found.shape == (len(rows), most)
        for (query, _), documents in zip(rows, found.tolist(), strict=True):
            expected = [] if query == -1 else [document for q, document in rows if q == query]
            assert sorted(documents) == sorted(expected + [-1] * (most - len(expected)))


def test_query_ids_of_rows_that_share_a_positive():
    # Rows 0 and 1 share passage 2; query 10 was asked again in row 2, whose positive is passage 0.
    ids = FalseNegatives(query_ids=torch.tensor([10, 11, 10, 11]))
    positives = torch.tensor([2, 2, 0, 1])
    assert sharing(positives) == 2
    rows = row_keys(ids, positives, [])
    columns = passage_keys(ids, positives, 4, sharing(positives))
    masked = mask(match(rows, columns), 4, 4, CPU)
    assert masked.int().tolist() == [[1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 1, 0], [0, 1, 1, 0]]
    regular = FalseNegatives(query_ids=torch.tensor([5, 6]))
    columns = passage_keys(regular, slice(0, 4, 2), 4, 2)
    masked = mask(match(row_keys(regular, slice(0, 4, 2), []), columns), 2, 4, CPU)
    assert masked.int().tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]


def test_documents_known_positives_and_padding():
    ids = FalseNegatives(
        passage_ids=torch.tensor([5, 6, -1, 5]),
        positive_ids=torch.tensor([[6, -1], [-1, -1]]),
    )
    rows = row_keys(ids, torch.tensor([0, 2]), [ids.positive_ids])
    assert rows.documents.shape == (2, 3)
    masked = mask(match(rows, passage_keys(ids, torch.tensor([0, 2]), 4, 1)), 2, 4, CPU)
    # The row's own positive matches too; that is no matter of keys: the positive always stays.
    assert masked.int().tolist() == [[1, 1, 0, 1], [0, 0, 0, 0]]


def test_sharing():
    assert sharing(torch.zeros(0, dtype=torch.int64)) == 1
    assert sharing(torch.tensor([3, 1, 3, 3])) == 3
