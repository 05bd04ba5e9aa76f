"""The loss of a small batch on one GPU, where launching kernels takes longer than running them.

Shapes: B queries (rows), N passages (columns), D dimension.

The scores fit in memory, so the fewest launches win: a product, one kernel for the loss and the scores' gradients, two
products, and in the backward pass one kernel for the rest. Scores are float32, as on the general path, which takes
twice as long at 1024 x 8192 (docs/benchmarks.md).
"""

import torch
from torch import Tensor

from inbatch.losses.softmax import Problem, refuse_second_derivatives
from inbatch.losses.triton import host
from inbatch.losses.triton.launch import launch

MAX_SCORES = 2**25  # 128 MiB of float32 scores; beyond it the general path is as fast


def fits(queries: Tensor, passages: Tensor, problem: Problem) -> bool:
    """Return True for the plain case, in which at most the ids of passages are compared."""
    keys, positives, device = problem.passage_keys, problem.positives, queries.device
    return (
        queries.dtype == torch.bfloat16
        and len(problem.passage_counts) == 1
        and isinstance(positives, slice)
        and isinstance(problem.temperature, float)
        and problem.false_negatives.margin is None
        and keys.queries is None
        and (keys.documents is None or (keys.documents.shape[1] == 1 and keys.documents.is_contiguous()))
        and (problem.row_keys.documents is None or problem.row_keys.documents.shape[1] == 1)
        and problem.chunk_mib is None
        and problem.stats is None
        and 0 < queries.shape[0] * passages.shape[0] <= MAX_SCORES
        and queries.shape[1] > 0
        and queries.is_contiguous()
        and passages.is_contiguous()
        and device.type == "cuda"
        and device.index == torch.cuda.current_device()
        and not torch.is_autocast_enabled("cuda")
    )


class SmallSoftmax(torch.autograd.Function):
    """(queries [B, D], passages [N, D], problem) -> mean loss, where `fits` allows it."""

    @staticmethod
    def forward(ctx, queries: Tensor, passages: Tensor, problem: Problem) -> Tensor:
        (B, _), N, ids = queries.shape, passages.shape[0], problem.passage_keys.documents
        dots_BN = torch.mm(queries, passages.T, out_dtype=torch.float32)
        shares_BN = torch.empty((B, N), dtype=queries.dtype, device=queries.device)
        loss_B, coefficient_B = torch.empty((2, B), dtype=torch.float32, device=queries.device).unbind()
        scale = 1 / problem.temperature
        vectors = loss_B, coefficient_B, loss_B if ids is None else ids
        arguments = dots_BN, shares_BN, *vectors, N, N // B, scale, scale / B
        constants = {"IDS": ids is not None, "BLOCK": min(1 << (N - 1).bit_length(), 4096)}
        launch(host.row_kernels.dense_kernel, B, arguments, constants, num_warps=8)
        d_queries = d_passages = None
        if ctx.needs_input_grad[0]:
            d_queries = torch.mm(shares_BN, passages, out_dtype=torch.float32)
        if ctx.needs_input_grad[1]:
            d_passages = torch.mm(shares_BN.T, queries, out_dtype=torch.float32)
        ctx.save_for_backward(queries, passages, coefficient_B, d_queries, d_passages)
        ctx.positives = problem.positives
        return loss_B.mean()

    @staticmethod
    def backward(ctx, grad: Tensor):
        refuse_second_derivatives()
        queries, passages, coefficient_B, d_queries, d_passages = ctx.saved_tensors
        return *host.close(
            queries, passages, ctx.positives, coefficient_B, d_queries, d_passages, grad, queries.dtype
        ), None
