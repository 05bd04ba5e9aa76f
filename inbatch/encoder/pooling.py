"""From token states to one vector per text. (Several: `multi_vector`.)

Shapes: B texts, T token positions, D dimension.
"""

import torch
from torch import Tensor

POOLINGS = ("mean", "cls", "last", "weighted_mean")
MULTI_VECTOR = "multi_vector"


def check_pooling(pooling: str) -> str:
    if pooling not in (*POOLINGS, MULTI_VECTOR):
        raise ValueError(f"unknown pooling {pooling!r}; choose one of {', '.join((*POOLINGS, MULTI_VECTOR))}")
    return pooling


def pool(states_BTD: Tensor, mask_BT: Tensor, pooling: str) -> Tensor:
    """Pool the states of the real tokens h_1..h_n of each text, wherever the padding is, into [B, D].

    mean: sum_t h_t / n; cls: h_1; last: h_n; weighted_mean: sum_t t h_t / sum_t t (SGPT, Muennighoff 2022).
    Sums and result are float32 (float64 stays float64) under autocast too. A text without tokens becomes 0.
    Gradients reach the real tokens only.

    Args:
        states_BTD: [B, T, D], any float dtype. T >= 1.
        mask_BT: [B, T] bool, True at real tokens, which are contiguous.
        pooling: one of POOLINGS.
    """
    wide = torch.promote_types(states_BTD.dtype, torch.float32)
    if pooling in ("cls", "last"):
        index_BT = mask_BT.int() if pooling == "cls" else mask_BT.cumsum(1) * mask_BT
        index_B11 = index_BT.argmax(1)[:, None, None].expand(-1, 1, states_BTD.shape[2])
        picked_BD = states_BTD.gather(1, index_B11).squeeze(1).to(wide)
        return picked_BD.masked_fill(~mask_BT.any(1, keepdim=True), 0.0)
    # masked_fill, not a product: whatever the backbone left at padded positions must not leak, NaN included.
    real_BTD = states_BTD.masked_fill(~mask_BT[:, :, None], 0.0)
    if pooling == "mean":
        return real_BTD.sum(1, dtype=wide) / mask_BT.sum(1, keepdim=True).clamp(min=1)
    weight_BT = (mask_BT.cumsum(1) * mask_BT).to(wide)
    total_B1 = weight_BT.sum(1, keepdim=True).clamp(min=1.0)
    return (real_BTD.to(wide) * weight_BT[:, :, None]).sum(1) / total_B1


def first_of(embeddings_BD: Tensor, rows: int, dimension: int | None) -> Tensor:
    """Return the first rows and components (None: all), never a view: FSDP2's hooks on an output warn of those."""
    if dimension is not None or rows < embeddings_BD.shape[0]:  # len() would fix the size of an ONNX file
        embeddings_BD = embeddings_BD[:rows, :dimension]
    return embeddings_BD.clone() if embeddings_BD._is_view() else embeddings_BD
