"""An encoder around a SentenceTransformer: Dense, StaticEmbedding, any pooling and other modules that ours lacks.

Shapes: B texts, T token positions, D dimension.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from inbatch.encoder.card import model_card
from inbatch.encoder.folder_settings import UnsupportedError
from inbatch.encoder.loading import (
    NO_LIMIT,
    cut_of,
    failing_as,
    local_folder,
    position_table,
    require_fit,
    restore_cut,
)
from inbatch.encoder.model import BiEncoderModel, attended
from inbatch.encoder.pooling import first_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def open_encoder(name_or_path: str | Path, *, backend: str = "auto", **options: Any) -> BiEncoderModel:
    """Open a model by its folder or name, with the options of `BiEncoderModel.from_pretrained`.

    backend: "inbatch" opens it by our own code, "sentence-transformers" by theirs; "auto" by theirs where ours does not
    know a module, and `backend_because` says which.
    """
    try:
        if backend != "sentence-transformers":
            return BiEncoderModel.from_pretrained(name_or_path, **options)
        reason = "model.backend says so"
    except UnsupportedError as error:
        if backend == "inbatch":
            raise
        reason = str(error)
    try:
        model = SentenceTransformerEncoder.from_pretrained(name_or_path, **options)
    except ImportError:
        raise ValueError(f"{reason}; sentence-transformers, which may open it, is not installed") from None
    model.backend_because = reason
    return model


class SentenceTransformerEncoder(BiEncoderModel):
    """A SentenceTransformer that is tokenised for, called and saved as a BiEncoderModel; `backbone` holds it."""

    _opened_with: dict[str, Any]

    def __init__(self, model: "SentenceTransformer"):
        nn.Module.__init__(self)
        self.head = self.multi_vector = None
        first: Any = model[0]
        kind = type(first).__name__
        if kind not in ("Transformer", "StaticEmbedding"):
            remedy = (
                "sentence-transformers' trainer does it, with the losses of inbatch.integrations.sentence_transformers"
                if kind == "Router"
                else "expected Transformer or StaticEmbedding"
            )
            raise ValueError(f"a model that begins with {kind} cannot be trained here: {remedy}")
        if any(getattr(module, "include_prompt", True) is False for module in model.modules()):
            raise ValueError("a pooling that leaves out prompts (include_prompt=false) cannot be trained here")
        if getattr(first, "query_expansion", None):
            raise ValueError("query_expansion cannot be trained here")
        self.backbone = model  # type: ignore[assignment]
        self._static = kind == "StaticEmbedding"
        self.tokenizer: Any = _Words(first.tokenizer) if self._static else first.tokenizer
        self._cut = cut_of(self.tokenizer)
        self.do_lower_case = bool(getattr(first, "do_lower_case", False))
        self.pooling = " + ".join(type(module).__name__ for module in model)
        self.l2_normalize = type(model[-1]).__name__ == "Normalize"
        self.prompts = {name: text or "" for name, text in model.prompts.items()}
        self.default_prompt_name, self.truncate_dim = model.default_prompt_name, model.truncate_dim
        self.similarity = model.similarity_fn_name or "cosine"
        self.query_length, self.document_length = (getattr(first, f"{n}_length", None) for n in ("query", "document"))
        transformer = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
        self.position_limit, self.position_offset = None, 0
        if transformer is not None:
            require_fit(Path(self.tokenizer.name_or_path), self.tokenizer, transformer, pooling="")
            self.position_limit, self.position_offset = position_table(transformer)
        # Theirs may be no limit (10 ** 30), or RoBERTa's table of positions, two of which it cannot use.
        limits = [length for length in (model.max_seq_length, self.position_limit) if length and length < NO_LIMIT]
        self.max_seq_length = None if self._static else min(limits, default=None)
        self.base_model = self.base_folder = self.backend_because = None
        self.packed, self.padded_because = False, "sentence-transformers encodes it"
        for module in model.modules():
            if isinstance(pooler := getattr(module, "pooler", None), nn.Module):
                pooler.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **options: Any) -> "SentenceTransformerEncoder":
        """Open a folder or hub name by sentence-transformers, with the options that mean something there.

        Raises ImportError where it is not installed, ValueError for options of our own modules.
        """
        from sentence_transformers import SentenceTransformer

        options["packed"] = options.get("packed") or None  # padded, as these are
        for name in ("pooling", "l2_normalize", "bidirectional", "packed", "multi_vector"):
            if options.pop(name, None) is not None:
                raise ValueError(
                    f"model.{name} is for models that inbatch opens itself: leave it out for {name_or_path}"
                )
        given = {name: options.pop(name, None) for name in ("dtype", "attn_implementation", "trust_remote_code")}
        dtype = getattr(torch, given["dtype"], None) if isinstance(given["dtype"], str) else given["dtype"]
        folder = local_folder(str(name_or_path))
        with failing_as(f"{folder}: sentence-transformers cannot open it"):
            model = SentenceTransformer(
                str(folder),
                device="cpu",
                trust_remote_code=bool(given["trust_remote_code"]),
                model_kwargs={key: value for key in ("dtype", "attn_implementation") if (value := given[key])},
            )
        encoder = cls(model if dtype is None else model.to(dtype))
        encoder.base_model, encoder._opened_with = str(name_or_path), given
        encoder.prompts |= options.pop("prompts", None) or {}
        length = options.pop("max_seq_length", None)
        assert not options, options
        encoder._check_length(length)
        if length is not None and not encoder._static:
            encoder.max_seq_length = length
        encoder._require_finite(folder)
        return encoder.eval()

    @property
    def embedding_dim(self) -> int:
        width = self.backbone.get_embedding_dimension()  # type: ignore[operator]
        return width if self.truncate_dim is None else min(width, self.truncate_dim)

    @property
    def kind(self) -> str:
        return self.pooling

    def token_ids(self, texts: list[str], max_length: int | None) -> list[list[int]]:
        if self._static:
            ids = [encoding.ids for encoding in self.tokenizer.core.encode_batch(texts, add_special_tokens=False)]
            return [row[:max_length] for row in ids]
        return super().token_ids([text.lower() for text in texts] if self.do_lower_case else texts, max_length)

    def encode(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Embed a tokenised batch into [B, D], as sentence-transformers' own encode does; see BiEncoderModel."""
        ids_BT, mask_BT = batch["input_ids"], batch["attention_mask"].bool()
        rows = ids_BT.shape[0]
        if ids_BT.numel() == 0:
            ids_BT, mask_BT = ids_BT.new_zeros(max(rows, 1), 1), mask_BT.new_zeros(max(rows, 1), 1)
        if self._static:
            counts_B = mask_BT.sum(1)
            features = {"input_ids": ids_BT[mask_BT], "offsets": counts_B.cumsum(0) - counts_B}
        else:
            features = {"input_ids": ids_BT, "attention_mask": attended(mask_BT).long()}
        embeddings_BD = self.backbone(features)["sentence_embedding"]
        embeddings_BD = embeddings_BD.to(torch.promote_types(embeddings_BD.dtype, torch.float32))
        return first_of(embeddings_BD, rows, self.truncate_dim)

    forward = encode

    def save_pretrained(self, folder: str | Path, *, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Save the folder as sentence-transformers does, with our card; state_dict as in BiEncoderModel."""
        model: Any = self.backbone
        if state_dict is not None:
            # The modules may be sharded: their state goes into new ones.
            assert self.base_model is not None
            model = SentenceTransformerEncoder.from_pretrained(self.base_model, **self._opened_with).backbone
            model.load_state_dict({key.removeprefix("backbone."): value for key, value in state_dict.items()})
        model.prompts, model.similarity_fn_name = dict(self.prompts), self.similarity
        model.default_prompt_name, model.truncate_dim = self.default_prompt_name, self.truncate_dim
        if not self._static:
            model[0].query_length, model[0].document_length = self.query_length, self.document_length
            restore_cut(self.tokenizer, self._cut)
            model.max_seq_length = self.max_seq_length or model.max_seq_length
        model.save_pretrained(str(folder), create_model_card=False)
        (Path(folder) / "README.md").write_text(model_card(self), encoding="utf-8")


class _Words:
    """The bare tokenizer of a StaticEmbedding, with what is asked of a tokenizer of transformers."""

    padding_side, pad_token_id = "right", 0

    def __init__(self, tokenizer: Any):
        self.core = tokenizer

    def num_special_tokens_to_add(self) -> int:
        return 0

    def save_pretrained(self, folder: str) -> None:
        self.core.save(str(Path(folder) / "tokenizer.json"))
