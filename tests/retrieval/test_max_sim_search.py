"""max_sim_top_k against a loop in float64 over all pairs, on any number of ranks."""

import pytest
import torch

from inbatch.retrieval.max_sim_search import max_sim_pair_scores, max_sim_top_k
from tests.helpers import device

DIM = 6


def texts(kind, count, longest, seed):
    """Vectors and lengths; ties: few distinct scores, so that most of a ranking is ties, at the boundary as well."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator)
    if kind == "ties":
        return torch.randint(-1, 2, (int(lengths.sum()), DIM), generator=generator).float(), lengths
    vectors = torch.randn(int(lengths.sum()), DIM, generator=generator)
    if kind == "negative":  # whatever padding held would win
        vectors = vectors.abs() * (1 if seed else -1)
    return vectors, lengths


def oracle(queries, passages):
    """Scores and indices of all passages, best first."""
    sides = [[text.double() for text in vectors.split(lengths.tolist())] for vectors, lengths in (queries, passages)]
    scores = torch.stack([torch.stack([(q @ p.T).amax(1).sum() for p in sides[1]]) for q in sides[0]])
    return scores.float().sort(dim=1, descending=True, stable=True)


@pytest.mark.parametrize("kind", ["random", "ties", "negative"])
def test_equals_the_oracle_for_any_chunks(kind):
    queries, passages = texts(kind, 9, 5, 0), texts(kind, 60, 11, 1)
    scores, indices = oracle(queries, passages)
    for k, query_tokens, block_tokens in ((60, 1000, 10000), (1, 7, 40), (10, 1, 1), (100, 1000, 50)):
        found = max_sim_top_k(*queries, *passages, k, query_tokens=query_tokens, block_tokens=block_tokens)
        assert torch.equal(found[0], scores[:, :k])
        assert torch.equal(found[1], indices[:, :k])
    half = [(vectors.half(), lengths) for vectors, lengths in (queries, passages)]
    assert torch.equal(max_sim_top_k(*half[0], *half[1], 60)[0], oracle(*half)[0])
    pairs = torch.stack([torch.arange(9).repeat_interleave(60), indices.flatten()], dim=1)
    assert torch.equal(max_sim_pair_scores(*queries, *passages, pairs), scores.flatten())


def _in_shards(rank, kind, counts, k, exclude):
    vectors, lengths = texts(kind, sum(counts), 11, 1)
    first = sum(counts[:rank])
    mine, starts = lengths[first : first + counts[rank]], lengths.cumsum(0) - lengths
    start = int(starts[first]) if counts[rank] else 0
    passages = vectors[start : start + int(mine.sum())].to(device()), mine.to(device())
    queries = [side.to(device()) for side in texts(kind, 9, 5, 0)]
    return [side.cpu() for side in max_sim_top_k(*queries, *passages, k, exclude=exclude, block_tokens=64)]


@pytest.mark.parametrize("counts", [(60,), (0, 60), (20, 0, 40)], ids=str)
def test_the_same_on_any_number_of_ranks(pool, counts):
    for kind in ("random", "ties"):
        scores, indices = oracle(texts(kind, 9, 5, 0), texts(kind, 60, 11, 1))
        exclude = torch.tensor([(row, int(indices[row, place])) for row in range(9) for place in range(0, 3 * row, 2)])
        for found in pool.run(_in_shards, len(counts), kind, counts, 50, exclude):
            for row in range(9):
                kept = [place for place in range(60) if [row, int(indices[row, place])] not in exclude.tolist()][:50]
                assert found[1][row].tolist() == indices[row, kept].tolist() + [-1] * (50 - len(kept))
                assert torch.equal(found[0][row, : len(kept)], scores[row, kept])
                assert found[0][row, len(kept) :].isneginf().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0; expected an integer of at least 1"),
        ({"query_lengths": torch.tensor([2, 1])}, "query_lengths add up to 3, of 2 vectors"),
        ({"passage_lengths": torch.tensor([3, 0])}, "passage 1 has 0 tokens; expected at least one"),
        ({"passage_lengths": torch.tensor([3.0])}, "passage_lengths are .*float32; expected int64"),
        ({"passage_vectors": torch.ones(3, 5)}, "query_vectors have dimension 4, passage_vectors 5"),
        ({"query_vectors": [[1.0]]}, r"query_vectors are list \[\[1.0\]\]; expected a float matrix"),
        ({"passage_vectors": torch.full((3, 4), torch.nan)}, "3 of 3 passage tokens on this rank hold NaN"),
        ({"passage_vectors": torch.empty(0, 4), "passage_lengths": torch.empty(0, dtype=torch.int64)}, "no passages"),
    ],
)
def test_misuse(change, message):
    given = {
        "query_vectors": torch.ones(2, 4), "query_lengths": torch.tensor([2]),
        "passage_vectors": torch.ones(3, 4), "passage_lengths": torch.tensor([3]), "k": 2,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        max_sim_top_k(**{**given, **change})


def _misuse_on_one_rank(rank):
    passages = torch.full((3, 4), torch.nan if rank else 1.0, device=device())
    lengths = torch.tensor([3], device=device())
    try:
        max_sim_top_k(passages[:1].abs().nan_to_num(1.0), lengths - 2, passages, lengths, 2)
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_mistake_of_one_rank_is_an_error_on_all(pool):
    first, second = pool.run(_misuse_on_one_rank, 2)
    assert first == second
    assert "rank 1: max_sim_top_k: 3 of 3 passage tokens on this rank hold NaN" in first
