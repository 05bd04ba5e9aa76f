"""LoRA (Hu et al. 2021) on the backbone, through peft; merged into the weights when the model is saved.

Like the other modules for training, it changes a BiEncoderModel in place.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from inbatch.encoder.model import BiEncoderModel


def add_lora(
    model: "BiEncoderModel",
    *,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    seed: int = 0,
) -> None:
    """W x becomes W x + (alpha / r) B A x in the chosen layers; only A [r, in] and B [out, r] = 0 are trained.

    target_modules: "all-linear", or names (endings) of linear layers such as ["q_proj", "v_proj"]. seed: of A, so
    that all ranks start alike. Raises ValueError where peft is missing or no layer has such a name.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ValueError("LoRA needs peft: install inbatch[peft], or set lora.r to null") from None
    backbone = model.backbone
    options = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        # Its output is never used.
        exclude_modules=["pooler.dense"] if getattr(backbone, "pooler", None) is not None else None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model.backbone = get_peft_model(backbone, options)  # type: ignore[assignment]
        except ValueError as error:
            raise ValueError(f"lora.target_modules {target_modules!r} does not fit this backbone: {error}") from None


def has_lora(model: "BiEncoderModel") -> bool:
    return hasattr(model.backbone, "merge_and_unload")


def merge_lora(model: "BiEncoderModel") -> None:
    """W + (alpha / r) B A as plain weights again; a model without LoRA stays as it is."""
    if has_lora(model):
        model.backbone = model.backbone.merge_and_unload()  # type: ignore[operator]
