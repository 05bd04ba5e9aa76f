"""LoRA (Hu et al. 2021) on the backbone, through peft; saved as an adapter, or merged into the weights.

Like the other modules for training, it changes a BiEncoderModel in place.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoConfig

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
    """Replace W x by W x + (alpha / r) B A x in the chosen layers; only A [r, in] and B [out, r] = 0 are trained.

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
    """Merge (alpha / r) B A into the weights W; leave a model without LoRA unchanged."""
    if has_lora(model):
        model.backbone = model.backbone.merge_and_unload()  # type: ignore[operator]


def check_adapter(model: "BiEncoderModel") -> None:
    """Raise ValueError for a model that an adapter cannot describe: a decoder made bidirectional, new tokens.

    An adapter's folder has no config.json: sentence-transformers would take it for the whole model. It reads that of
    the base model, at the top of its folder.
    """
    config = model.backbone.config
    if model.base_folder is not None and not (model.base_folder / "config.json").is_file():
        raise ValueError(
            f"{model.base_model} is an adapter, or has its backbone in a folder of its own, and sentence-transformers "
            "opens no adapter of it: set lora.merge to true"
        )
    base = AutoConfig.from_pretrained(str(config.name_or_path), trust_remote_code=False)
    if getattr(config, "is_causal", None) != getattr(base, "is_causal", None):
        raise ValueError(
            f"{config.name_or_path} does not record bidirectional attention, and an adapter cannot: set lora.merge to "
            "true, or model.bidirectional to false"
        )
    if config.vocab_size != base.vocab_size:
        raise ValueError(
            f"the model has {config.vocab_size} tokens, {config.name_or_path} has {base.vocab_size}, and an adapter "
            "cannot hold new ones: set lora.merge to true, or prefixes that need none"
        )


def save_lora(model: "BiEncoderModel", folder: Path, weights: Mapping[str, Tensor] | None) -> None:
    """Write the adapter to a folder, the name of its base model in it; weights: of the backbone, None reads them."""
    check_adapter(model)
    backbone: Any = model.backbone
    base = model.base_model
    if base is not None and (path := Path(base).expanduser()).is_dir():
        base = str(path.resolve())
    for options in backbone.peft_config.values():
        options.base_model_name_or_path = base or options.base_model_name_or_path
    backbone.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
