"""Packed encoding: the real tokens of a batch as one sequence, so that no work is spent on padding.

Every layer but attention treats tokens alone, so [B, T] texts become [1, N]; attention gets the texts' boundaries and
runs within each. It is registered with transformers under the name IMPLEMENTATION. On CUDA in float16 or bfloat16 it
is FlashAttention-2 (Dao 2023) in torch's own build, windows, grouped heads and dropout included; for short texts, as
queries are, the memory-efficient kernels of xFormers, in torch as well. Anywhere else the queries, keys and values are
padded for scaled_dot_product_attention, and only there.

Shapes: B texts, T token positions, N real tokens, M = B T slots, D dimension,
H heads, E dimension of a head.
"""

import inspect
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "inbatch_packed"
# The names that transformers has for where texts begin and how long the longest is.
BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# Up to so many tokens and dimensions the memory-efficient kernels, whose tiles are 64 x 64 and not 128 x 128, take 0.34
# to 0.65 of FlashAttention-2's time; beyond either they take longer, 1.4 to 1.7 times for heads of 128 (H200).
SHORT, NARROW = 64, 64
# Backbones whose packed states equal the padded ones, each held by a test; any other one is tried when it is loaded.
PACKABLE = ("bert", "llama", "ministral3", "modernbert", "qwen3", "roberta")


def token_slots(mask_BT: Tensor) -> Tensor:
    """Return the places [N] of the real tokens among all M slots. On a GPU the CPU waits for N."""
    return mask_BT.flatten().nonzero().squeeze(1)


def packed_states(
    backbone: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor, slots_N: Tensor, **options
) -> Tensor:
    """Return the backbone's last states [B, T, D] of the real tokens, 0 at padding; every text needs a real token."""
    inputs = packed_inputs(mask_BT, slots_N, input_ids=ids_BT, position_ids=positions_BT)
    states_ND = backbone(**inputs, return_dict=True, **options).last_hidden_state.squeeze(0)
    padded_MD = states_ND.new_zeros(mask_BT.numel(), states_ND.shape[1]).index_copy(0, slots_N, states_ND)
    return padded_MD.unflatten(0, mask_BT.shape)


def packed_inputs(mask_BT: Tensor, slots_N: Tensor, **tokens_BT: Tensor) -> dict[str, Any]:
    """Return what a backbone takes of texts as one sequence: of each tensor the real tokens [1, N], and BOUNDS."""
    starts = pad(mask_BT.sum(1).cumsum(0), (1, 0)).int()
    # T instead of the longest text: it only sizes the launch, and asking the device would wait for it.
    longest = mask_BT.shape[1]
    return {
        **{name: value.flatten()[slots_N][None] for name, value in tokens_BT.items()},
        # Never read. transformers passes a mask of four dimensions on; without one it looks for texts in the positions
        # of a causal decoder, and waits for the device to say whether there are several.
        "attention_mask": mask_BT[None, None, :0, :0],
        **dict(zip(BOUNDS, (starts, starts, longest, longest), strict=True)),
    }


def wish(packed: bool | None, device: torch.device) -> bool | None:
    """Return `packed` of `BiEncoderModel.from_pretrained` for a user's wish: None packs on CUDA, wherever it can.

    On a CPU, where it saves a tenth of the time of a MiniLM, it stays a wish.
    """
    return False if packed is None and device.type != "cuda" else packed


def enable_packing(backbone: PreTrainedModel) -> str | None:
    """Set the backbone's attention to ours, or leave it and return why packed states would not be the padded ones."""
    kind = backbone.config.model_type
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        return f"{kind} takes no position_ids"
    before = cast(str, backbone.config._attn_implementation)
    backbone.set_attn_implementation(IMPLEMENTATION)
    if backbone.config._attn_implementation != IMPLEMENTATION:
        return f"{kind} does not let its attention be replaced"
    problem = None if kind in PACKABLE else _try_packing(backbone)
    if problem is not None:
        backbone.set_attn_implementation(before)
    return problem


@torch.no_grad()
def _try_packing(backbone: PreTrainedModel) -> str | None:
    kind = backbone.config.model_type
    ids_BT = torch.tensor([[1, 2, 1, 2], [2, 1, 1, 1]], device=backbone.device)
    mask_BT = torch.tensor([[True] * 4, [True] * 3 + [False]], device=backbone.device)
    positions_BT = torch.arange(4, device=backbone.device).expand(2, 4)
    window = getattr(backbone.config, "sliding_window", None)
    try:
        if window is not None:
            backbone.config.sliding_window = 2  # shorter than these texts
        actual_BTD = packed_states(backbone, ids_BT, mask_BT, positions_BT, token_slots(mask_BT))
        expected_BTD = backbone(
            input_ids=ids_BT, attention_mask=mask_BT.long(), position_ids=positions_BT
        ).last_hidden_state
    except Exception as error:  # a backbone's own code raises whatever it runs into
        return f"{kind} cannot be packed ({error})"
    finally:
        if window is not None:
            backbone.config.sliding_window = window
    error = (actual_BTD - expected_BTD)[mask_BT].abs().max() / expected_BTD[mask_BT].abs().max()
    if not error <= (1e-4 if expected_BTD.dtype == torch.float32 else 2e-2):
        return f"{kind} mixes the tokens of different texts when packed"
    return None


def _attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **options):
    """Serve transformers' attention interface: query [1, H, N, E] to [1, N, H, E]; without boundaries, plain SDPA.

    The first dimension is squeezed and not indexed: the gradient of an index is a copy.
    """
    starts = options.pop("cu_seq_lens_q", None)
    if starts is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **options
        )
    for feature in ("softcap", "s_aux", "position_bias"):
        if options.get(feature) is not None:
            raise ValueError(f"packed attention has no {feature}")
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        query, key, value = (tensor.to(torch.get_autocast_dtype(kind)) for tensor in (query, key, value))
    causal = module.is_causal if is_causal is None else is_causal
    window = None if options.get("sliding_window") is None else _window(module.config.sliding_window, causal)
    run = _repadded
    if _has_kernel(query):
        short = options["max_length_q"] <= SHORT and query.shape[-1] <= NARROW and window is None
        run = _efficient if short else _flash
    states_NHE = run(query, key, value, starts, options["max_length_q"], dropout, scaling, causal, window)
    return states_NHE[None], None


def _window(size: int, causal: bool) -> tuple[int, int]:
    """Return how many tokens back and ahead are seen: what transformers' masks for its SDPA attention say.

    Not what it gives FlashAttention, which is one less each way when bidirectional. From the config and not the
    argument, since backbones disagree on what they put there (ModernBERT adds one).
    """
    return (size - 1, 0) if causal else (size, size)


def _has_kernel(query: Tensor) -> bool:
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _flash(query, key, value, starts, longest, dropout, scaling, causal, window) -> Tensor:
    # torch.nn.attention.varlen is this operation without dropout, and only in later releases.
    query_NHE, key_NHE, value_NHE = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    back, ahead = window or (-1, -1)
    return torch.ops.aten._flash_attention_forward(
        query_NHE,
        key_NHE,
        value_NHE,
        starts,
        starts,
        longest,
        longest,
        dropout,
        causal,
        False,
        scale=scaling,
        window_size_left=back,
        window_size_right=ahead,
    )[0]


def _efficient(query, key, value, starts, longest, dropout, scaling, causal, window) -> Tensor:
    query_1NHE, key_1NHE, value_1NHE = (tensor.transpose(1, 2) for tensor in (query, key, value))
    if (shared := query.shape[1] // key.shape[1]) > 1:
        key_1NHE, value_1NHE = (x.repeat_interleave(shared, dim=2) for x in (key_1NHE, value_1NHE))
    return torch.ops.aten._efficient_attention_forward(
        query_1NHE,
        key_1NHE,
        value_1NHE,
        None,
        starts,
        starts,
        longest,
        longest,
        dropout,
        1 if causal else 0,
        True,
        scale=scaling,
    )[0].squeeze(0)


def _repadded(query, key, value, starts, longest, dropout, scaling, causal, window) -> Tensor:
    """SDPA on texts padded for it alone; nothing here waits for the device."""
    tokens, T = query.shape[2], longest
    lengths_B = starts.diff()
    rows_N = torch.repeat_interleave(lengths_B, output_size=tokens)
    slots_N = rows_N * T + torch.arange(tokens, device=query.device) - starts[rows_N]
    blocks = []
    for tensor in (query, key, value):
        flat_NHE = tensor.squeeze(0).transpose(0, 1)
        padded_MHE = flat_NHE.new_zeros(len(lengths_B) * T, *flat_NHE.shape[1:]).index_copy(0, slots_N, flat_NHE)
        blocks.append(padded_MHE.unflatten(0, (-1, T)).transpose(1, 2))
    columns_T = torch.arange(T, device=query.device)
    real_BT = columns_T < lengths_B[:, None]
    mask = real_BT[:, None, None, :]
    if causal or window is not None:
        back, ahead = window or (T, 0)
        distance_TT = columns_T[:, None] - columns_T
        mask = mask & (distance_TT <= back) & (distance_TT >= -ahead)
        # A padded position far from every real token would have nothing to attend to.
        mask = mask | ~real_BT[:, None, :, None]
    output_BHTE = scaled_dot_product_attention(
        *blocks, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output_BHTE.transpose(1, 2).flatten(0, 1)[slots_N]


def _mask(*args, attention_mask: Tensor | None = None, **options) -> Tensor | None:
    """SDPA's mask for a padded batch; a packed one comes without and needs none (SDPA's would be N x N)."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **options)


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
