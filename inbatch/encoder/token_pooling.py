"""Fewer vectors a document: clusters of similar ones are replaced by their means (Clavié et al. 2024).

The clusters are Ward's, of the distances 1 - x . y, as in sentence-transformers and PyLate. Documents of a batch are
clustered together: a step merges the nearest two clusters of each document that has more than it may keep.

Shapes: B documents, T token positions, D dimension, A documents that still have clusters to merge.
"""

import torch
from torch import Tensor

_ELEMENTS = 1 << 24  # distances at a time, in float64: 128 MiB, or one document's


@torch.no_grad()
def pool_tokens(vectors_BTD: Tensor, factor: int, protected: int) -> Tensor:
    """Return the vectors [B, T, D] that are left, 0 elsewhere; a vector of zeros counts as none.

    The first `protected` vectors of a document stay; the n others become max(1, n // factor) means, not normalised.
    """
    if factor == 1 or not vectors_BTD.numel():
        return vectors_BTD
    at_a_time = max(1, _ELEMENTS // vectors_BTD.shape[1] ** 2)
    return torch.cat([_pooled(some, factor, protected) for some in vectors_BTD.split(at_a_time)])


def _pooled(vectors_BTD: Tensor, factor: int, protected: int) -> Tensor:
    real_BT = vectors_BTD.any(-1)
    free_BT = real_BT & (real_BT.cumsum(1) > protected)
    free_B = free_BT.sum(1)
    merges_B = (free_B - (free_B // factor).clamp(min=1)).clamp(min=0)
    order_B = merges_B.argsort(descending=True, stable=True)
    sorted_BTD, merges = vectors_BTD[order_B], merges_B[order_B].tolist()
    cluster_BT = _clusters(sorted_BTD, free_BT[order_B], merges)
    place_T = torch.arange(vectors_BTD.shape[1], device=vectors_BTD.device)
    member_BTT = ((cluster_BT[:, None] == place_T[:, None]) & real_BT[order_B][:, None]).to(vectors_BTD.dtype)
    means_BTD = member_BTT @ sorted_BTD / member_BTT.sum(2, keepdim=True).clamp(min=1)
    return torch.empty_like(means_BTD).index_copy_(0, order_B, means_BTD)


def _clusters(vectors_BTD: Tensor, free_BT: Tensor, merges: list[int]) -> Tensor:
    """Return the cluster of each vector [B, T]: the place of its first. merges: of each document, the most first."""
    B, T, _ = vectors_BTD.shape
    # Squared distances order as distances do, and Ward's update of them has no root. Infinite: never merged.
    squared_BTT = (1 - vectors_BTD @ vectors_BTD.mT).double().clamp_(0, 2).square_()
    squared_BTT.masked_fill_(~(free_BT[:, :, None] & free_BT[:, None]), torch.inf)
    squared_BTT.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    near_BT, nearest_BT = squared_BTT.min(2)  # of each cluster, kept up to date
    size_BT = free_BT.double()
    cluster_BT = torch.arange(T, device=vectors_BTD.device).repeat(B, 1)
    for step in range(merges[0]):
        rows_A = torch.arange(sum(count > step for count in merges), device=vectors_BTD.device)
        near_AT, nearest_AT, size_AT, cluster_AT = (
            x[: len(rows_A)] for x in (near_BT, nearest_BT, size_BT, cluster_BT)
        )
        smallest_A, one_A = near_AT.min(1)
        other_A = nearest_AT[rows_A, one_A]
        i_A, j_A = one_A.minimum(other_A), one_A.maximum(other_A)
        size_i_A, size_j_A = size_AT[rows_A, i_A, None], size_AT[rows_A, j_A, None]
        merged_AT = (
            (size_AT + size_i_A) * squared_BTT[rows_A, i_A]
            + (size_AT + size_j_A) * squared_BTT[rows_A, j_A]
            - size_AT * smallest_A[:, None]
        ) / (size_AT + size_i_A + size_j_A)
        squared_BTT[rows_A, i_A] = squared_BTT[rows_A, :, i_A] = merged_AT
        squared_BTT[rows_A, j_A] = squared_BTT[rows_A, :, j_A] = torch.inf
        size_AT[rows_A, i_A] += size_AT[rows_A, j_A]
        near_AT[rows_A, j_A] = torch.inf
        cluster_AT.copy_(torch.where(cluster_AT == j_A[:, None], i_A[:, None], cluster_AT))
        # A merged cluster is at least as far away as the nearer of its parts: only their neighbours search again.
        stale_AT = (nearest_AT == i_A[:, None]) | (nearest_AT == j_A[:, None])
        stale_AT[rows_A, i_A] = True
        places = (stale_AT & near_AT.isfinite()).nonzero(as_tuple=True)
        near_AT[places], nearest_AT[places] = squared_BTT[places].min(1)
    return cluster_BT
