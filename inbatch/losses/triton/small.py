"""The loss of a small batch on one GPU, where launching kernels takes longer than running them.

Shapes: B queries (rows), N passages (columns), D dimension.

The scores fit in memory, so the fewest launches win: a product, one kernel for the loss and the scores' gradients, two
products, and in the backward pass one kernel for the rest. Scores are float32, as on the general path, which takes
twice as long at 1024 x 8192 (docs/benchmarks.md).
"""

import math

import torch
from torch import Tensor

from inbatch.losses.masking import FalseNegatives
from inbatch.losses.softmax import LEAST_TEMPERATURE, refuse_second_derivatives
from inbatch.losses.triton import host
from inbatch.losses.triton.launch import launch

MAX_SCORES = 2**25  # 128 MiB of float32 scores; beyond it the general path is as fast


def fits(
    queries: Tensor, passages: Tensor, temperature: float | Tensor, false_negatives: FalseNegatives | None
) -> bool:
    """Return True for the plain case, in which at most the ids of passages are compared; False for wrong inputs, too.

    It comes before everything else: the checks of the general path take a fifth of this path's time.
    """
    return (
        isinstance(passages, Tensor)
        and queries.dtype == torch.bfloat16 == passages.dtype
        and queries.device == passages.device
        and queries.ndim == 2 == passages.ndim
        and queries.is_contiguous()
        and passages.is_contiguous()
        and queries.shape[1] == passages.shape[1] > 0
        and 0 < queries.shape[0] * passages.shape[0] <= MAX_SCORES
        and passages.shape[0] % queries.shape[0] == 0
        and isinstance(temperature, float)
        and LEAST_TEMPERATURE <= temperature < math.inf
        and queries.device.index == torch.cuda.current_device()
        and not torch.is_autocast_enabled("cuda")
        and host.kernels is not None
        and (false_negatives is None or _passage_ids_alone(false_negatives, passages))
    )


def _passage_ids_alone(ids: FalseNegatives, passages: Tensor) -> bool:
    return (
        isinstance(ids, FalseNegatives)
        and ids.query_ids is ids.positive_ids is ids.margin is None
        and not ids.needs_groups
        and isinstance(ids.passage_ids, Tensor)
        and ids.passage_ids.dtype == torch.int64
        and ids.passage_ids.shape == passages.shape[:1]
        and ids.passage_ids.device == passages.device
        and ids.passage_ids.is_contiguous()
    )


class SmallSoftmax(torch.autograd.Function):
    """(queries [B, D], passages [N, D], passage ids [N] or None, temperature) -> mean loss, where `fits` allows it."""

    @staticmethod
    def forward(ctx, queries: Tensor, passages: Tensor, ids: Tensor | None, temperature: float) -> Tensor:
        (B, _), N = queries.shape, passages.shape[0]
        dots_BN = torch.mm(queries, passages.T, out_dtype=torch.float32)
        shares_BN = torch.empty((B, N), dtype=queries.dtype, device=queries.device)
        loss_B, coefficient_B = torch.empty((2, B), dtype=torch.float32, device=queries.device).unbind()
        scale = 1 / temperature
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
        return loss_B.mean()

    @staticmethod
    def backward(ctx, grad: Tensor):
        refuse_second_derivatives()
        queries, passages, coefficient_B, d_queries, d_passages = ctx.saved_tensors
        positives = slice(0, passages.shape[0], passages.shape[0] // queries.shape[0])
        gradients = host.close(queries, passages, positives, coefficient_B, d_queries, d_passages, grad, queries.dtype)
        return *gradients, None, None
