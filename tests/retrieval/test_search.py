"""top_k against a dense float64 oracle, on any number of ranks. Q queries, N documents, D dimension, W world size."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inbatch.retrieval import search
from tests.helpers import device


def oracle(queries, documents, k, similarity="dot"):
    """Every score in float64, rounded to float32; by falling score, then rising index."""
    queries, documents = queries.double(), documents.double()
    scores = queries @ documents.T
    if similarity == "cosine":
        scores = scores / (queries.norm(dim=1)[:, None] * documents.norm(dim=1)).clamp_min(1e-300)
    scores, indices = scores.float().sort(dim=1, descending=True, stable=True)
    return scores[:, :k], indices[:, :k]


def embeddings(kind, count, dimension, seed):
    generator = torch.Generator().manual_seed(seed)
    if kind == "ties":  # few distinct vectors and scores: most of a ranking is ties, at the boundary as well
        return torch.randint(-1, 2, (count, dimension), generator=generator).float()
    rows = torch.randn(count, dimension, generator=generator)
    if kind == "near ties":  # copies, exact or a last digit away
        rows = rows[: max(1, count // 20)].repeat(21, 1)[:count] if count else rows
        rows = torch.where(torch.rand(rows.shape, generator=generator) < 0.01, rows.nextafter(rows + 1), rows)
    return rows


KINDS = {"random": 48, "ties": 3, "near ties": 32}


@pytest.mark.parametrize("similarity", search.SIMILARITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_oracle_for_any_chunks(kind, similarity):
    queries = embeddings(kind, 37, KINDS[kind], 0)
    documents = embeddings(kind, 701, KINDS[kind], 1)
    for k in (1, 10, 100, 701):
        scores, indices = oracle(queries, documents, k, similarity)
        for query_chunk, document_chunk in ((1024, 16384), (10, 64), (37, 1), (1, 257)):
            if document_chunk == 1 and k > 10:
                continue
            found = search.top_k(
                queries, documents, k, similarity=similarity, query_chunk=query_chunk, document_chunk=document_chunk
            )
            assert torch.equal(found[0], scores)
            assert torch.equal(found[1], indices)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_scored_as_exactly_as_float32(dtype):
    queries, documents = embeddings("random", 20, 64, 2).to(dtype), embeddings("random", 3000, 64, 3).to(dtype)
    scores, indices = search.top_k(queries, documents, 50)
    expected = oracle(queries, documents, 50)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, expected[0])
    assert torch.equal(indices, expected[1])


@pytest.mark.parametrize("kind", KINDS)
def test_excluded_pairs_are_never_returned(kind):
    queries, documents = embeddings(kind, 40, KINDS[kind], 0), embeddings(kind, 300, KINDS[kind], 1)
    _, best = oracle(queries, documents, 300)
    # Of each query some of its best, those of the last query all but five.
    exclude = [(row, int(best[row, place])) for row in range(40) for place in range(0, row % 7 * 3, 2)]
    exclude += [(39, int(column)) for column in best[39, 5:]]
    for k, query_chunk, document_chunk in ((10, 1024, 16384), (150, 16, 64), (300, 7, 299)):
        options = {"query_chunk": query_chunk, "document_chunk": document_chunk}
        scores, indices = search.top_k(queries, documents, k, exclude=torch.tensor(exclude), **options)
        for row in range(40):
            allowed = [column for column in best[row].tolist() if (row, column) not in exclude][:k]
            assert indices[row].tolist() == allowed + [-1] * (k - len(allowed))
            assert scores[row, len(allowed) :].isneginf().all()
            assert scores[row, : len(allowed)].isfinite().all()


def test_embeddings_that_are_all_alike_are_ranked_by_their_scores_all_the_same():
    documents = 1 + 1e-7 * embeddings("random", 500, 16, 0)  # as of a model that has collapsed
    queries = 1 + 1e-7 * embeddings("random", 30, 16, 1)
    expected = oracle(queries, documents, 20)
    found = search.top_k(queries, documents, 20, document_chunk=128)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_a_callers_autocast_and_matmul_precision_change_nothing():
    queries, documents = embeddings("random", 20, 64, 6), embeddings("random", 2000, 64, 7)
    expected = oracle(queries, documents, 10)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = [search.top_k(queries, documents, 10)]
        assert torch.get_float32_matmul_precision() == "medium"
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # set both ways, torch can no longer say which it is
            torch.backends.cuda.matmul.fp32_precision = "ieee"
            found.append(search.top_k(queries, documents, 10))
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision(before)
    for scores, indices in found:
        assert torch.equal(scores, expected[0])
        assert torch.equal(indices, expected[1])


def test_no_more_columns_than_documents_and_no_queries():
    documents = embeddings("random", 5, 8, 0)
    scores, indices = search.top_k(embeddings("random", 3, 8, 1), documents, 100)
    assert scores.shape == indices.shape == (3, 5)
    scores, indices = search.top_k(documents[:0], documents, 100)
    assert scores.shape == indices.shape == (0, 5)


def test_zero_vectors_and_huge_and_tiny_ones_have_a_cosine():
    documents = torch.tensor([[0.0, 0.0], [1e-30, 0.0], [0.0, 1e15], [1.0, 1.0]])
    scores, indices = search.top_k(torch.tensor([[1e-20, 0.0], [0.0, 0.0]]), documents, 4, similarity="cosine")
    assert indices.tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]]
    assert scores[0].tolist() == pytest.approx([1, 0.5**0.5, 0, 0])
    assert scores[1].tolist() == [0, 0, 0, 0]


def _search_in_shards(rank, kind, dimension, counts, k, similarity, chunk, backwards, exclude=None):
    """Rank r holds counts[r] documents; backwards: the last rank holds the first ones and says so by its offset."""
    queries = embeddings(kind, 23, dimension, 0).to(device())
    documents = embeddings(kind, sum(counts), dimension, 1)
    order = list(range(len(counts)))[:: -1 if backwards else 1]
    offset = sum(counts[other] for other in order[: order.index(rank)])
    mine = documents[offset : offset + counts[rank]].to(device())
    where = {"offset": offset, "exclude": exclude} if backwards else {"exclude": exclude}
    found = search.top_k(queries, mine, k, similarity=similarity, document_chunk=chunk, query_chunk=10, **where)
    return [tensor.cpu() for tensor in found]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [(300,), (300, 0), (7, 293), (120, 0, 180), (1, 298, 1)], ids=str)
def test_the_same_on_any_number_of_ranks(pool, kind, counts):
    dimension = KINDS[kind]
    for k, similarity, backwards in ((10, "cosine", False), (150, "dot", True), (1000, "dot", False)):
        scores, indices = oracle(embeddings(kind, 23, dimension, 0), embeddings(kind, 300, dimension, 1), k, similarity)
        args = (kind, dimension, counts, k, similarity, 64, backwards)
        for found in pool.run(_search_in_shards, len(counts), *args):
            assert torch.equal(found[0], scores)
            assert torch.equal(found[1], indices)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_property_any_split_any_ties(pool, data):
    kind = data.draw(st.sampled_from(list(KINDS)))
    counts = data.draw(st.lists(st.integers(0, 90), min_size=1, max_size=3).filter(any))
    k = data.draw(st.integers(1, 120))
    similarity = data.draw(st.sampled_from(search.SIMILARITIES))
    pair = st.tuples(st.integers(0, 22), st.integers(0, sum(counts) - 1))
    exclude = set(data.draw(st.lists(pair, max_size=200)))
    args = (kind, 4, counts, k, similarity, data.draw(st.integers(1, 100)), data.draw(st.booleans()))
    scores, indices = oracle(embeddings(kind, 23, 4, 0), embeddings(kind, sum(counts), 4, 1), sum(counts), similarity)
    expected = []
    for row in range(len(indices)):
        allowed = [place for place, column in enumerate(indices[row].tolist()) if (row, column) not in exclude][:k]
        missing = min(k, scores.shape[1]) - len(allowed)
        expected.append(
            (scores[row, allowed].tolist() + [-math.inf] * missing, indices[row, allowed].tolist() + [-1] * missing)
        )
    pairs = torch.tensor(sorted(exclude), dtype=torch.int64).reshape(-1, 2)
    for found in pool.run(_search_in_shards, len(counts), *args, pairs):
        assert list(zip(found[0].tolist(), found[1].tolist(), strict=True)) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0; expected an integer of at least 1"),
        ({"similarity": "l2"}, "'l2'; expected one of cosine, dot"),
        ({"documents": torch.zeros(0, 4)}, "no documents on any rank"),
        ({"documents": torch.zeros(3, 5)}, "queries have dimension 4, documents 5"),
        ({"documents": torch.tensor([[0, 0, 0, 0], [0, 0, torch.nan, 0]])}, "NaN or infinity, the first in row 1"),
        ({"queries": torch.full((1, 4), torch.inf)}, "1 of 1 queries on this rank hold NaN or infinity"),
        ({"queries": torch.zeros(2, 4, dtype=torch.int64)}, "expected a float matrix"),
        ({"queries": [[1.0]]}, r"queries are list \[\[1.0\]\]; expected a float matrix"),
        ({"documents": None}, "documents are NoneType None; expected a float matrix"),
        ({"queries": torch.full((1, 4), 1e30), "documents": torch.full((1, 4), 1e30)}, "overflow float32"),
        ({"document_chunk": 0}, "expected at least 1"),
    ],
)
def test_misuse(change, message):
    args = {"queries": torch.ones(2, 4), "documents": torch.ones(3, 4), "k": 2} | change
    with pytest.raises(ValueError, match=message):
        search.top_k(args.pop("queries"), args.pop("documents"), args.pop("k"), **args)


def _misuse_on_one_rank(rank, dimension, value, k):
    try:
        search.top_k(
            torch.ones(2, dimension[rank]).to(device()),
            None if value[rank] is None else torch.full((3, dimension[rank]), value[rank]).to(device()),
            k[rank],
        )
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("dimension", "value", "k", "message"),
    [
        ((4, 8), (1.0, 1.0), (2, 2), "rank 0 has (rows, 4) float32, rank 1 has (rows, 8) float32"),
        ((4, 4), (1.0, float("nan")), (2, 2), "rank 1: top_k: 3 of 3 documents on this rank hold NaN"),
        ((4, 4), (1.0, None), (2, 2), "rank 1: top_k: documents are NoneType None"),
        ((4, 4), (1.0, 1.0), (2, 3), "k: rank 0 has 2, rank 1 has 3"),
        ((4, 4), (1.0, 1.0), (0, 3), "rank 0: top_k: k is 0"),
    ],
)
def test_a_mistake_of_one_rank_is_an_error_on_all(pool, dimension, value, k, message):
    first, second = pool.run(_misuse_on_one_rank, 2, dimension, value, k)
    assert first == second
    assert message in first
