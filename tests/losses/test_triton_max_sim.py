"""Late interaction's Triton kernels against PyTorch's in float64: on a GPU where there is one, else interpreted.

Without a GPU everything here is skipped but what `test_triton.test_in_the_interpreter` runs, in float32, on small
shapes. Shapes: B queries, C passages, t and T tokens of the longest, D dimension.
"""

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("triton", reason="the fused path needs triton")

from inbatch import info_nce
from inbatch.losses import CLIP, FalseNegatives
from inbatch.losses.max_sim import Tokens, in_place, make_grid, max_sim, read_spans, ring_max_sim
from inbatch.losses.triton import host as fused
from inbatch.losses.triton import max_sim as kernels
from tests.pool import BACKEND

CUDA = torch.cuda.is_available() and not fused.INTERPRETED
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = [torch.float32, *([torch.bfloat16, torch.float16] if CUDA else [])]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}  # of gradients
pytestmark = pytest.mark.skipif(not CUDA and not fused.INTERPRETED, reason="no GPU here, and not in the interpreter")

# B, C, t, T, D: several tiles of queries and one that ends within a text, several blocks of a passage, one token and no
# power of two, nothing.
SHAPES = [(9, 3, 20, 5, 16), (2, 2, 3, 40, 8), (3, 4, 1, 1, 24), (0, 3, 4, 4, 16), (3, 0, 4, 4, 16)]
if CUDA:
    SHAPES += [(37, 65, 32, 180, 128), (5, 9, 512, 1024, 128), (300, 200, 8, 12, 96), (2, 4000, 3, 5, 256)]


def error(found, truth):
    assert found.isfinite().all()
    return ((found.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-300)).item()


def text_vectors(count, longest, dimension, seed, *, ties=False):
    """Vectors [count, longest, D] and a mask; ties: few values, so that most maxima are equal and exact."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, longest, dimension)
    vectors = torch.randint(-1, 2, shape, generator=generator) if ties else torch.randn(shape, generator=generator)
    lengths = torch.randint(1, longest + 1, (count, 1), generator=generator)
    return vectors.float().to(DEVICE), (torch.arange(longest) < lengths).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_places_and_gradients(shape, dtype, monkeypatch):
    B, C, t, T, D = shape
    monkeypatch.setitem(kernels.TILES["order"], "BLOCK", 64)  # so that small shapes have several blocks
    for ties in (False, True):
        sides = text_vectors(B, t, D, 0, ties=ties), text_vectors(C, T, D, 1, ties=ties)
        leaves = [vectors.to(dtype).requires_grad_() for vectors, _ in sides]
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        weights = torch.randn(B, C, generator=torch.Generator().manual_seed(2)).to(DEVICE)
        options = {"mean": ties, "chunk_mib": 0.001 * ties or None}
        scores = {}
        for fuse, (queries, passages) in ((True, leaves), (False, wide)):
            of_queries = Tokens(queries[sides[0][1]], sides[0][1].sum(1))
            spans, _ = read_spans({"passages": (passages, sides[1][1])}, fused=fuse)
            scores[fuse] = max_sim(of_queries, in_place(passages, *spans), fused=fuse, **options)
            (scores[fuse] * weights).sum().backward()
        assert scores[True].dtype == torch.float32
        assert error(scores[True], scores[False]) < (1e-6 if dtype == torch.float32 else 1e-5)
        for found, truth in zip(leaves, wide, strict=True):
            assert error(found.grad, truth.grad) < TOLERANCE[dtype]
        if B and C and ties:
            queries = leaves[0].detach()[sides[0][1]]
            of_queries, (passages, mask) = (queries, sides[0][1].sum(1)), sides[1]
            of_passages = passages[mask].to(dtype), mask.sum(1), mask.sum(1).cumsum(0) - mask.sum(1)
            places = [make_grid(*of_queries, False, None, longest).scores(*of_passages)[1] for longest in (T, None)]
            assert places[0].dtype == torch.int16
            assert torch.equal(places[0].T, places[1])


def test_the_loss_and_that_it_repeats():
    (queries, query_mask), (passages, passage_mask) = text_vectors(2, 4, 16, 0), text_vectors(4, 5, 16, 1)
    passage_mask = passage_mask.flip(1)  # padding in front
    holes = passage_mask.clone()
    holes[:, 2] = holes[:, 0] = False
    holes[:, -1] = True
    ids = FalseNegatives(passage_ids=torch.arange(4, device=DEVICE) // 3, margin=0.5)
    for mask, objective, chunk_mib in ((passage_mask, None, None), (holes, None, 1e-5), (passage_mask, CLIP, None)):
        found = {}
        for impl in ("reference", "fused", "fused") if mask is holes else ("reference", "fused"):
            leaves = [vectors.clone().requires_grad_() for vectors in (queries, passages)]
            loss = info_nce(
                *leaves, query_mask=query_mask, passage_mask=mask, temperature=2.0, false_negatives=ids,
                objective=objective, impl=impl, chunk_mib=chunk_mib, token_reduction="mean",
            )  # fmt: skip
            loss.backward()
            results = [loss.detach(), *(leaf.grad for leaf in leaves)]
            if impl in found:
                assert all(torch.equal(a, b) for a, b in zip(found[impl], results, strict=True))
            found[impl] = results
        for a, b in zip(found["fused"], found["reference"], strict=True):
            assert error(a, b) < 1e-5


def test_nan_is_not_hidden():
    queries, passages = torch.ones(1, 2, 16, device=DEVICE), torch.ones(3, 4, 16, device=DEVICE)
    passages[1] = torch.nan
    assert info_nce(queries, passages, impl="fused").isnan()
    assert info_nce(queries * torch.nan, passages[:1], impl="fused", negatives="local").isnan()


def test_what_it_cannot_do():
    wide = torch.ones(2, 2, 300, device=DEVICE)
    with pytest.raises(ValueError, match="may have up to 256 dimensions, the inputs have 300"):
        info_nce(wide, wide, impl="fused")
    with pytest.raises(ValueError, match="it computes in float32, the inputs are float64"):
        info_nce(wide[..., :4].double(), wide[..., :4].double(), impl="fused")


def _over_ranks(rank, counts):
    device = torch.device("cuda", rank % torch.cuda.device_count()) if CUDA else DEVICE
    sides = text_vectors(sum(counts[0]), 3, 16, 0), text_vectors(sum(counts[1]), 5, 16, 1)
    for negatives in ("gather", "ring"):
        found = {}
        for impl in ("reference", "fused"):
            leaves, masks = [], []
            for (vectors, mask), count in zip(sides, counts, strict=True):
                mine = slice(sum(count[:rank]), sum(count[: rank + 1]))
                leaves.append(vectors[mine].to(device).requires_grad_())
                masks.append(mask[mine].to(device))
            loss = info_nce(
                *leaves, query_mask=masks[0], passage_mask=masks[1], temperature=1.0, negatives=negatives, impl=impl
            )
            loss.backward()
            found[impl] = [loss.detach(), *(leaf.grad for leaf in leaves)]
        for a, b in zip(found["fused"], found["reference"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    return dist.get_world_size()


@pytest.mark.skipif(CUDA and BACKEND != "nccl", reason="gloo sends no tensors of GPUs")
def test_over_ranks(pool):
    for counts in (((2, 1), (4, 2)), ((2, 0), (2, 0))):  # uneven, an empty rank
        assert pool.run(_over_ranks, 2, counts) == [2, 2]


def test_the_ring_of_one():
    (queries, _), (passages, _) = text_vectors(2, 3, 16, 0), text_vectors(3, 4, 16, 1)
    lengths = [torch.full((len(side),), side.shape[1], device=DEVICE) for side in (queries, passages)]
    found = []
    for fuse in (True, False):
        leaves = [side.flatten(0, 1).clone().requires_grad_() for side in (queries, passages)]
        tokens = [Tokens(leaf, length) for leaf, length in zip(leaves, lengths, strict=True)]
        scores = ring_max_sim(*tokens, [lengths[1]], 0, None, mean=False, chunk_mib=None, fused=fuse)
        scores.square().sum().backward()
        found.append([scores.detach(), *(leaf.grad for leaf in leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
