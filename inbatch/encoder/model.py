"""A bi-encoder: backbone, pooling, normalisation, tokenizer; opens and writes sentence-transformers folders.

Shapes: B texts, T token positions, D dimension.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from inbatch.encoder.first_words import first_words, holds_last_word, splits_at_blanks
from inbatch.encoder.loading import (
    length_limit,
    load_backbone,
    load_tokenizer,
    local_folder,
    position_table,
    set_attention,
)
from inbatch.encoder.packing import enable_packing, packed_states, token_slots
from inbatch.encoder.pooling import check_pooling, pool
from inbatch.encoder.st_folder import Layout, read_layout, write_layout
from inbatch.grad_cache.memory import to_device


class BiEncoderModel(nn.Module):
    """e(text) = normalise(pool(backbone(text))): one encoder for queries and passages.

    Build it with `from_pretrained`. `model(batch)` is `model.encode(batch)`, so that DDP and FSDP2 can wrap it.

    Attributes:
        backbone: the transformers model. tokenizer: its tokenizer.
        prompts: name -> text put in front, e.g. "query", "document". default_prompt_name: what
            sentence-transformers uses when no prompt is named; `tokenize` uses prompts only when named.
        max_seq_length: tokens a text is cut to by default, None is no limit. embedding_dim: D.
        packed: whether `encode` skips padding; may be switched off and on for a model opened with packed=True.
    """

    def __init__(
        self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layout: Layout, *, packed: bool = False
    ):
        super().__init__()
        self.backbone: PreTrainedModel = backbone
        self.tokenizer = tokenizer
        self._cuts_of: tuple[tuple[int, int], bool] | None = None  # see _may_cut
        self.pooling = check_pooling(layout.pooling)
        self.l2_normalize = layout.l2_normalize
        self.prompts = dict(layout.prompts)
        self.default_prompt_name = layout.default_prompt_name
        self.similarity = layout.similarity
        self.do_lower_case = layout.do_lower_case
        self.position_limit, self.position_offset = position_table(backbone)
        self.max_seq_length = layout.max_seq_length
        self._check_length(self.max_seq_length)
        # Asked once, here: a later wrapper (peft) takes anything.
        accepted = inspect.signature(backbone.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._no_cache = {"use_cache": False} if "use_cache" in accepted else {}
        self.packed = packed
        if packed:
            if not self._takes_positions:
                raise ValueError(f"packed=True: {backbone.config.model_type} takes no position_ids; use packed=False")
            enable_packing(backbone)
        # The pooled output is never used: a trainable pooler would leave DDP waiting for its gradient.
        if isinstance(pooler := getattr(backbone, "pooler", None), nn.Module):
            pooler.requires_grad_(False)
        self.train(backbone.training)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        pooling: str | None = None,
        l2_normalize: bool | None = None,
        bidirectional: bool | None = None,
        prompts: Mapping[str, str] | None = None,
        max_seq_length: int | None = None,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
        packed: bool = False,
    ) -> "BiEncoderModel":
        """Open a transformers or sentence-transformers model, from a folder or by its name on the hub.

        None is what the saved model says; where it says nothing: mean pooling, normalised, and bidirectional
        attention for decoders. A decoder that sentence-transformers saved stays as it was saved.

        Args:
            pooling: "mean", "cls", "last" or "weighted_mean".
            bidirectional: every token sees every token. Kept in config.json as is_causal=false, which transformers
                and sentence-transformers honour when they open the folder.
            prompts: replaces the saved prompts of the same names.
            dtype: "float32", torch.bfloat16, ...; None is the dtype of the weights on disk.
            attn_implementation: "sdpa", "eager", "flash_attention_2", ...; None lets transformers choose.
            packed: encode without padding (`inbatch.packing`): the same embeddings, to rounding.

        Raises:
            ValueError: no such model; a module, pooling or backbone that is not supported.
        """
        if packed and attn_implementation is not None:
            raise ValueError(
                f"packed=True brings its own attention: leave out attn_implementation={attn_implementation!r}"
            )
        folder = local_folder(str(name_or_path))
        saved = read_layout(folder) or Layout(pooling="mean", l2_normalize=True, bidirectional=True)
        saved = replace(saved, pooling=check_pooling(pooling or saved.pooling))
        home = folder / saved.backbone_path
        backbone = load_backbone(home, dtype, attn_implementation)
        set_attention(backbone, bidirectional, default=saved.bidirectional)
        tokenizer = load_tokenizer(home, lower_case=saved.do_lower_case)
        layout = replace(
            saved,
            l2_normalize=saved.l2_normalize if l2_normalize is None else l2_normalize,
            prompts={**saved.prompts, **(prompts or {})},
            max_seq_length=(
                length_limit(saved.max_seq_length, tokenizer, backbone) if max_seq_length is None else max_seq_length
            ),
        )
        return cls(backbone, tokenizer, layout, packed=packed)

    @property
    def embedding_dim(self) -> int:
        return self.backbone.config.get_text_config().hidden_size

    def encode(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Embed a tokenised batch into [B, D] float32 (float64 for a float64 backbone).

        Reads `input_ids` [B, T], `attention_mask` [B, T] (1 at real tokens, contiguous; padding on either side) and
        what `to_device` adds; other keys are ignored. B = 0 gives [0, D] that still depends on every parameter a batch
        uses, so that all ranks of a data-parallel group take part in the reductions. A text without tokens becomes 0.
        """
        ids_BT, mask_BT = _check_batch(batch, self.position_limit)
        rows = ids_BT.shape[0]
        if ids_BT.numel() == 0:
            ids_BT, mask_BT = ids_BT.new_zeros(max(rows, 1), 1), mask_BT.new_zeros(max(rows, 1), 1)
        attend_BT = _attended(mask_BT)
        # Positions count real tokens, so that padding on the left does not shift them.
        positions_BT = (attend_BT.cumsum(1) - 1).clamp(min=0) + self.position_offset
        if self.packed:
            # To find them on a GPU is to wait for it.
            slots_N = batch["token_slots"] if "token_slots" in batch else token_slots(attend_BT)
            states_BTD = packed_states(self.backbone, ids_BT, attend_BT, positions_BT, slots_N, **self._no_cache)
        else:
            positions = {"position_ids": positions_BT} if self._takes_positions else {}
            states_BTD = self.backbone(
                input_ids=ids_BT, attention_mask=attend_BT.long(), **positions, **self._no_cache
            ).last_hidden_state
        embeddings_BD = pool(states_BTD, mask_BT, self.pooling)
        if self.l2_normalize:
            embeddings_BD = nn.functional.normalize(embeddings_BD, dim=-1)
        # Not a view, which FSDP2's hooks on the output would warn of.
        return embeddings_BD if rows else embeddings_BD[:0].clone()

    forward = encode

    def to_device(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `encode` reads of a batch in host memory, on the model's device; the CPU does not wait for the GPU.

        For a packed model it adds "token_slots", the places of all real tokens: their number is known to the CPU only
        as long as the mask is in host memory. The batch is ready for `encode` as it is; rows must be chosen before.
        """
        ids_BT, mask_BT = _check_batch(batch, self.position_limit)
        ready = {"input_ids": ids_BT, "attention_mask": mask_BT}
        if self.packed and ids_BT.numel():
            ready["token_slots"] = token_slots(_attended(mask_BT))
        device = next(self.backbone.parameters()).device
        return {name: to_device(value, device) for name, value in ready.items()}

    def tokenize(
        self, texts: Sequence[str], *, prompt: str | None = None, max_length: int | None = None
    ) -> dict[str, Tensor]:
        """Texts to padded int64 `input_ids` and `attention_mask` [B, T], T the longest text's length.

        Args:
            prompt: the name of one of `prompts`, put in front of every text; None is none.
            max_length: tokens to cut to, special tokens included; None is `max_seq_length`.

        Raises:
            ValueError: one string in place of a sequence, an unknown prompt, a length that is no positive integer or
                more than the backbone's positions.
        """
        if isinstance(texts, str):
            raise ValueError(f"tokenize: texts is one string; expected a sequence of them: pass [{texts[:40]!r}]")
        if prompt is not None and prompt not in self.prompts:
            raise ValueError(f"unknown prompt {prompt!r}; this model has {sorted(self.prompts)}")
        limit = self.max_seq_length if max_length is None else max_length
        self._check_length(limit)
        if not texts:
            return {key: torch.zeros(0, 0, dtype=torch.int64) for key in ("input_ids", "attention_mask")}
        prefix = self.prompts[prompt] if prompt else ""
        tokens = self._cut_and_padded([prefix + text for text in texts], limit)
        return {key: tokens[key].long() for key in ("input_ids", "attention_mask")}

    def _cut_and_padded(self, whole: list[str], limit: int | None) -> BatchEncoding:
        if limit is None or self.tokenizer.truncation_side != "right" or not self._may_cut():
            return self._padded(whole, limit)
        # A word mostly gives a token, so the first `limit` words hold the first `limit` tokens.
        cut = [first_words(text, limit) for text in whole]
        tokens = self._padded([text for text, _ in cut], limit)
        short = (tokens["attention_mask"].sum(1) < limit).tolist()
        texts = [
            whole[row] if short[row] or holds_last_word(tokens, row, last, len(text)) else text
            for row, (text, last) in enumerate(cut)
        ]
        if all(len(text) == len(first) for text, (first, _) in zip(texts, cut, strict=True)):
            return tokens
        return self._padded(texts, limit)

    def _may_cut(self) -> bool:
        """splits_at_blanks: asking takes a millisecond, so again only for another tokenizer or added tokens."""
        asked = id(self.tokenizer), len(self.tokenizer)
        if self._cuts_of is None or self._cuts_of[0] != asked:
            self._cuts_of = asked, splits_at_blanks(self.tokenizer)
        return self._cuts_of[1]

    def _padded(self, texts: list[str], limit: int | None) -> BatchEncoding:
        return self.tokenizer(
            texts,
            padding=True,
            truncation=limit is not None,
            max_length=limit,
            return_tensors="pt",
            return_token_type_ids=False,
        )

    def _check_length(self, length: int | None) -> None:
        if length is None:
            return
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ValueError(f"a length of {length!r} tokens; expected an integer of at least 1, or None")
        if self.position_limit and length > self.position_limit:
            raise ValueError(f"a length of {length} tokens exceeds the {self.position_limit} positions of the backbone")

    def gradient_checkpointing_enable(self) -> None:
        """Recompute activations in the backward pass (non-reentrant, which DDP and FSDP2 need)."""
        self.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def save_pretrained(self, folder: str | Path, *, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write a folder that `SentenceTransformer(folder)` and `from_pretrained(folder)` open alike.

        state_dict: this model's whole state where the parameters are sharded (FSDP2); None reads the parameters.
        """
        folder = Path(folder)
        if hasattr(self.backbone, "merge_and_unload"):
            raise ValueError(
                "the backbone has an adapter: set model.backbone = model.backbone.merge_and_unload() first"
            )
        weights = None
        if state_dict is not None:
            prefix = "backbone."
            weights = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
            if not weights:
                raise ValueError(f"state_dict has no key that starts with {prefix!r}; pass this model's own state_dict")
        self.backbone.save_pretrained(folder, state_dict=weights)
        if self.pooling == "weighted_mean":
            # sentence-transformers weighs by the column, padding included: only right padding gives our weights.
            # In init_kwargs, or a tokenizer that has padded on the left is saved and opened doing so.
            self.tokenizer.padding_side = self.tokenizer.init_kwargs["padding_side"] = "right"
        self.tokenizer.save_pretrained(folder)
        layout = Layout(
            pooling=self.pooling,
            l2_normalize=self.l2_normalize,
            prompts=self.prompts,
            default_prompt_name=self.default_prompt_name,
            similarity=self.similarity,
            max_seq_length=self.max_seq_length,
            do_lower_case=self.do_lower_case,
        )
        write_layout(folder, layout, self.embedding_dim)


def _attended(mask_BT: Tensor) -> Tensor:
    """The real tokens, and the first of a text that has none: its softmax would have no terms. It pools to 0."""
    attend_BT = mask_BT.clone()
    attend_BT[:, 0] |= ~mask_BT.any(1)
    return attend_BT


def _check_batch(batch: Mapping[str, Tensor], limit: int | None) -> tuple[Tensor, Tensor]:
    for key in ("input_ids", "attention_mask"):
        if key not in batch:
            raise ValueError(f"the batch has no {key!r}; it has {sorted(batch)}")
        if batch[key].ndim != 2:
            raise ValueError(f"{key} must be [B, T], got shape {tuple(batch[key].shape)}")
    ids_BT, mask_BT = batch["input_ids"], batch["attention_mask"]
    if ids_BT.shape != mask_BT.shape:
        raise ValueError(
            f"input_ids {tuple(ids_BT.shape)} and attention_mask {tuple(mask_BT.shape)} must have the same shape"
        )
    if limit is not None and ids_BT.shape[1] > limit:
        raise ValueError(
            f"the batch has {ids_BT.shape[1]} token positions, the backbone only {limit}: tokenise with a max_length"
        )
    return ids_BT, mask_BT.bool()
