"""A bi-encoder: backbone, pooling, normalisation, tokenizer; opens and writes sentence-transformers folders.

Shapes: B texts, T token positions, D dimension.
"""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from inbatch.encoder.card import model_card, push
from inbatch.encoder.loading import (
    cut_of,
    failing_as,
    length_limit,
    load_backbone,
    load_tokenizer,
    local_folder,
    padding_shifts,
    position_table,
    require_fit,
    restore_cut,
    set_attention,
)
from inbatch.encoder.lora import has_lora, save_lora
from inbatch.encoder.multi_vector import ROLES, TASKS, UNSEEN, MultiVector, TokenVectors
from inbatch.encoder.multi_vector_folder import open_head, with_multi_vector, write_multi_vector
from inbatch.encoder.packing import enable_packing, packed_states, token_slots
from inbatch.encoder.pooling import check_pooling, first_of, pool
from inbatch.encoder.st_folder import Folder, Layout, read_layout, write_layout


class BiEncoderModel(nn.Module):
    """e(text) = normalise(pool(backbone(text))): one encoder for queries and passages. (Or one vector a token.)

    Build it with `from_pretrained`. `model(batch)` is `model.encode(batch)`, so that DDP and FSDP2 can wrap it.

    Attributes:
        backbone: the transformers model. tokenizer: its tokenizer.
        prompts: name -> text put in front, e.g. "query", "document". default_prompt_name: what
            sentence-transformers uses when no prompt is named; `tokenize` uses prompts only when named.
        similarity: how embeddings are compared: "cosine", "dot", "euclidean" or "manhattan".
        truncate_dim: components that an embedding keeps, after the normalisation; None is all. embedding_dim: D.
        max_seq_length: tokens a text is cut to by default, None is no limit; query_length and document_length
            take its place for texts with the prompts "query" and "document".
        packed: True where `encode` skips padding; may be switched off and on for a model that was opened so.
        padded_because: why the model was not opened so; None where it was.
        base_model: folder or name that the model was opened from, for its card.
        backend_because: why sentence-transformers opened it (see `open_encoder`); None where it did not.
        multi_vector, head: how tokens become vectors, and the module that does it; None for another pooling.
    """

    pooling: str
    l2_normalize: bool
    prompts: dict[str, str]
    default_prompt_name: str | None
    similarity: str
    truncate_dim: int | None
    max_seq_length: int | None
    query_length: int | None
    document_length: int | None
    do_lower_case: bool
    multi_vector: MultiVector | None

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        layout: Layout,
        *,
        packed: bool | None = False,
        head: TokenVectors | None = None,
    ):
        super().__init__()
        self.backbone: PreTrainedModel = backbone
        self.head = head
        self.tokenizer = tokenizer
        self._cut = cut_of(tokenizer)
        check_pooling(layout.pooling)
        for field in fields(Layout):
            setattr(self, field.name, getattr(layout, field.name))
        self.position_limit, self.position_offset = position_table(backbone)
        for length in (self.max_seq_length, self.query_length, self.document_length):
            self._check_length(length)
        # Asked once, here: a later wrapper (peft) takes anything.
        accepted = inspect.signature(backbone.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._no_cache = {"use_cache": False} if "use_cache" in accepted else {}
        self.base_model: str | None = None
        self.base_folder: Path | None = None  # where that lies here
        self.backend_because: str | None = None
        self.padded_because: str | None = "packed=False was given"
        if packed is not False:
            self.padded_because = enable_packing(backbone)
            if packed and self.padded_because is not None:
                raise ValueError(f"packed=True: {self.padded_because}; use packed=False")
        self.packed = self.padded_because is None
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
        packed: bool | None = False,
        trust_remote_code: bool = False,
        multi_vector: Mapping[str, Any] | None = None,
    ) -> "BiEncoderModel":
        """Open a transformers or sentence-transformers model, from a folder or by its name on the hub.

        None is what the saved model says; where it says nothing: mean pooling, normalised, and bidirectional
        attention for decoders. A decoder that sentence-transformers saved stays as it was saved.

        Args:
            pooling: "mean", "cls", "last", "weighted_mean", or "multi_vector" for a vector a token (late interaction),
                which a model of one vector gets a new random projection for.
            bidirectional: every token sees every token. Kept in config.json as is_causal=false, which transformers
                and sentence-transformers honour when they open the folder.
            prompts: replaces the saved prompts of the same names.
            dtype: "float32", torch.bfloat16, ...; None is the dtype of the weights on disk.
            attn_implementation: "sdpa", "eager", "flash_attention_2", ...; None lets transformers choose.
            packed: encode without padding (`inbatch.encoder.packing`): the same embeddings, to rounding. True refuses
                a backbone that does not allow it; None opens it padded, and `padded_because` says why.
            trust_remote_code: run the code that a folder brings for its backbone or tokenizer.
            multi_vector: fields of `MultiVector` that differ from what the saved model says.

        Raises:
            ValueError: no such model; a file that is wrong; a setting, module or backbone that is not supported, the
                latter as UnsupportedError where sentence-transformers would open it.
        """
        if packed and attn_implementation is not None:
            raise ValueError(
                f"packed=True brings its own attention: leave out attn_implementation={attn_implementation!r}"
            )
        folder = local_folder(str(name_or_path))
        saved = read_layout(folder)
        from_sentence_transformers = saved is not None
        saved = saved or Folder(layout=Layout(pooling="mean", l2_normalize=True), bidirectional=True)
        layout = replace(saved.layout, pooling=check_pooling(pooling or saved.layout.pooling))
        layout = with_multi_vector(str(name_or_path), saved.layout, layout, multi_vector, l2_normalize)
        home = folder / saved.home
        backbone = load_backbone(folder, saved.home, dtype, attn_implementation, trust_remote_code=trust_remote_code)
        set_attention(backbone, bidirectional, default=saved.bidirectional)
        tokenizer = load_tokenizer(
            home, saved.tokenizer_options, lower_case=layout.do_lower_case, trust_remote_code=trust_remote_code
        )
        require_fit(home, tokenizer, backbone, saved.layout.pooling if from_sentence_transformers else None)
        if max_seq_length is None:
            max_seq_length = length_limit(home, layout.max_seq_length, tokenizer, backbone)
        layout = replace(
            layout,
            l2_normalize=layout.l2_normalize if l2_normalize is None else l2_normalize,
            prompts={**layout.prompts, **(prompts or {})},
            max_seq_length=max_seq_length,
        )
        head = None
        if layout.multi_vector is not None:
            layout, head = open_head(folder, saved, layout, backbone, tokenizer)
        model = cls(backbone, tokenizer, layout, packed=packed if attn_implementation is None else False, head=head)
        if packed is None and attn_implementation is not None:
            model.padded_because = f"attn_implementation={attn_implementation!r} was given"
        model.base_model, model.base_folder = str(name_or_path), folder
        model._require_finite(home)
        return model

    @property
    def way(self) -> str:
        """Return a line that says by whose code, and whether padding is encoded, and why."""
        if self.backend_because is not None:
            return f"opened by sentence-transformers: {self.backend_because}"
        if self.padded_because is None:
            return "texts are encoded packed, without padding"
        return f"texts are encoded with padding: {self.padded_because}"

    @property
    def kind(self) -> str:
        """Say what it is made of, in words for its card."""
        if self.multi_vector is not None:
            return f"a vector of {self.embedding_dim} numbers for each token of {self.backbone.config.model_type}"
        return f"{self.pooling} pooling of {self.backbone.config.model_type}"

    @property
    def embedding_dim(self) -> int:
        width = self.backbone.config.hidden_size
        if self.multi_vector is not None:
            return self.multi_vector.dim
        return width if self.truncate_dim is None else min(width, self.truncate_dim)

    def encode(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Embed a tokenised batch into [B, D] float32 (float64 for a float64 backbone).

        Reads `input_ids` [B, T], `attention_mask` [B, T] (1 at real tokens, contiguous; padding on either side) and
        what `to_device` adds; other keys are ignored. B = 0 gives [0, D] that still depends on every parameter a batch
        uses, so that all ranks of a data-parallel group take part in the reductions. A text without tokens becomes 0.

        Pooling "multi_vector" gives [B, T, D], 0 at tokens that count for nothing, so that `.any(-1)` is the mask of
        the others. It also reads "token_roles", which `mark` adds and `tokenize` for a task.
        """
        ids_BT, mask_BT = _check_batch(batch, self.position_limit)
        rows = ids_BT.shape[0]
        if ids_BT.numel() == 0:
            ids_BT, mask_BT = ids_BT.new_zeros(max(rows, 1), 1), mask_BT.new_zeros(max(rows, 1), 1)
        attend_BT = seen_BT = attended(mask_BT)
        roles_BT = batch.get(ROLES) if ids_BT is batch["input_ids"] else None
        packed = self.packed
        if roles_BT is not None:
            seen_BT = attend_BT & (roles_BT != UNSEEN)
            # Packed attention has no tokens that attend and are not attended to.
            packed = packed and ("token_slots" in batch or bool(torch.equal(seen_BT, attend_BT)))
        # Positions count real tokens, so that padding on the left does not shift them.
        positions_BT = (attend_BT.cumsum(1) - 1).clamp(min=0) + self.position_offset
        if packed:
            # To find them on a GPU is to wait for it.
            slots_N = batch["token_slots"] if "token_slots" in batch else token_slots(attend_BT)
            states_BTD = packed_states(self.backbone, ids_BT, attend_BT, positions_BT, slots_N, **self._no_cache)
        else:
            positions = {"position_ids": positions_BT} if self._takes_positions else {}
            states_BTD = self.backbone(
                input_ids=ids_BT, attention_mask=seen_BT.long(), return_dict=True, **positions, **self._no_cache
            ).last_hidden_state
        if self.head is not None:
            counts_BT = mask_BT if roles_BT is None else mask_BT & (roles_BT != 0)
            vectors_BTD = self.head(states_BTD, attended(counts_BT))
            return vectors_BTD if rows else vectors_BTD[:0].clone()
        embeddings_BD = pool(states_BTD, mask_BT, self.pooling)
        if self.l2_normalize:
            embeddings_BD = nn.functional.normalize(embeddings_BD, dim=-1)
        return first_of(embeddings_BD, rows, self.truncate_dim)

    forward = encode

    def to_device(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what `encode` reads of a batch in host memory, on the model's device; the CPU does not wait.

        For a packed model it adds "token_slots", the places of all real tokens: their number is known to the CPU only
        as long as the mask is in host memory. The batch is ready for `encode` as it is; rows must be chosen before.
        """
        ids_BT, mask_BT = _check_batch(batch, self.position_limit)
        ready = {"input_ids": ids_BT, "attention_mask": mask_BT}
        if ROLES in batch:
            ready[ROLES] = batch[ROLES]
        if self.packed and ids_BT.numel() and not (ROLES in batch and (batch[ROLES] == UNSEEN).any()):
            ready["token_slots"] = token_slots(attended(mask_BT))
        device = next(self.backbone.parameters()).device
        return {name: to_device(value, device) for name, value in ready.items()}

    def tokenize(
        self,
        texts: Sequence[str],
        *,
        prompt: str | None = None,
        task: str | None = None,
        prefix: str | None = None,
        max_length: int | None = None,
    ) -> dict[str, Tensor]:
        """Turn texts into padded int64 `input_ids` and `attention_mask` [B, T], T the longest text's length.

        A multi-vector model also says what each token of a task's texts counts for; see `mark`.

        Args:
            prompt: the name of one of `prompts`, put in front of every text; None is none.
            task: "query" or "document": with the prompt of that name, if there is one, and its length limit.
            prefix: text put in front instead of a prompt.
            max_length: tokens to cut to, special tokens included; None is the model's length for such texts.

        Raises:
            ValueError: one string in place of a sequence, an unknown prompt, a length that is no positive integer or
                more than the backbone's positions.
        """
        if isinstance(texts, str):
            raise ValueError(f"tokenize: texts is one string; expected a sequence of them: pass [{texts[:40]!r}]")
        texts = list(texts)
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise ValueError(f"tokenize: one of the texts is {wrong[0]!r:.40}; expected strings")
        if prompt is not None and prompt not in self.prompts:
            raise ValueError(f"unknown prompt {prompt!r}; this model has {sorted(self.prompts)}")
        if prefix is None:
            prefix = self.prompts.get(prompt or task or "", "")
        if max_length is None:
            lengths = {"query": self.query_length, "document": self.document_length}
            max_length = lengths.get(task or prompt or "") or self.max_seq_length
        self._check_length(max_length)
        if not texts:
            tokens = {key: torch.zeros(0, 0, dtype=torch.int64) for key in ("input_ids", "attention_mask")}
            return self.mark(tokens, task or prompt)
        if prefix and max_length and len(self.token_ids([prefix], max_length)[0]) >= max_length:
            warnings.warn(
                f"the prompt {prefix!r:.60} fills all {max_length} tokens that a text may have: none are left for it",
                stacklevel=2,
            )
        rows = self.token_ids([prefix + text for text in texts], max_length)
        # Padded here: transformers takes as long for padding, masks and their tensors as for the tokens.
        lengths_B = torch.tensor([len(row) for row in rows])
        ids_N = torch.from_numpy(np.fromiter(chain.from_iterable(rows), np.int64, int(lengths_B.sum())))
        places_T = torch.arange(int(lengths_B.max()))
        if self.tokenizer.padding_side == "left":
            places_T = places_T.flip(0)
        mask_BT = places_T < lengths_B[:, None]
        ids_BT = torch.full(mask_BT.shape, cast(int, self.tokenizer.pad_token_id)).masked_scatter_(mask_BT, ids_N)
        return self.mark({"input_ids": ids_BT, "attention_mask": mask_BT.long()}, task or prompt)

    def mark(self, tokens: Mapping[str, Tensor], task: str | None) -> dict[str, Tensor]:
        """Return tokens in host memory as they are encoded for a task, "query" or "document".

        Those of a multi-vector model get "token_roles" int64 [B, T]: 0 counts for nothing, 1 counts, 2 counts but is
        attended to by no other token. Its queries are filled up with mask tokens, which the attention mask has, too.
        Another model's tokens stay as they are, as do those of no task.
        """
        if self.head is None or self.multi_vector is None or task not in TASKS:
            return dict(tokens)
        return self.head.mark(tokens, task, self.multi_vector, self.query_length)

    def token_ids(self, texts: list[str], max_length: int | None) -> list[list[int]]:
        """Return the ids of the tokens of each text, special ones included; max_length None cuts nothing."""
        tokenizer = self.tokenizer
        options = {"truncation": max_length is not None, "max_length": max_length}
        options |= {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        which = f"one of {len(texts)} texts, the first of which is {''.join(texts[:1])[:40]!r}"
        with failing_as(f"{self.base_model}: its tokenizer fails on {which} (look at its tokenizer.json)"):
            if type(tokenizer)._encode_plus is not PreTrainedTokenizerFast._encode_plus:
                return tokenizer(texts, **options)["input_ids"]
            # One text sets the length in the tokenizer's core, which saves a third of the time where no offsets are
            # asked.
            tokenizer(texts[:1], **options)
            core = cast(PreTrainedTokenizerFast, tokenizer).backend_tokenizer
            return [encoding.ids for encoding in core.encode_batch_fast(texts)]

    @torch.no_grad()
    def _require_finite(self, home: Path) -> None:
        """ValueError where the model as it was opened cannot embed a text."""
        training = self.training
        with failing_as(f"{home}: its model embeds no text"):
            embeddings_BD = self.eval()(self.tokenize(["text"]))
        self.train(training)
        if not embeddings_BD.isfinite().all():
            raise ValueError(
                f"{home}: its model's embeddings hold NaN or infinity: its weights or config.json are wrong"
            )

    def _check_length(self, length: int | None) -> None:
        if length is None:
            return
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ValueError(f"a length of {length!r} tokens; expected an integer of at least 1, or None")
        if length <= (special := self.tokenizer.num_special_tokens_to_add()):
            raise ValueError(f"a length of {length} tokens leaves none to a text beside the {special} special ones")
        if self.position_limit and length > self.position_limit:
            raise ValueError(f"a length of {length} tokens exceeds the {self.position_limit} positions of the backbone")

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute activations in the backward pass; non-reentrant, as DDP and FSDP2 need it, unless told otherwise.

        It takes what transformers' Trainer gives to a model of its own.
        """
        model = next((module for module in self.backbone.modules() if isinstance(module, PreTrainedModel)), None)
        if model is None:
            raise ValueError("model.gradient_checkpointing: there is no transformer in this model")
        given = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=given, **options)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None) -> str:
        """Save the model to the hub as `repo_id`, its card included, and return its address; see `card.push`."""
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push(folder, repo_id, private=private)

    def save_pretrained(self, folder: str | Path, *, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write a folder that `SentenceTransformer(folder)` and `from_pretrained(folder)` open alike, with a card.

        Adapters of peft are saved as such, beside the name of their base model; `merge_lora` merges them before.
        state_dict: this model's whole state where the parameters are sharded (FSDP2); None reads the parameters.
        """
        folder = Path(folder).expanduser()
        weights = None
        if state_dict is not None:
            weights = _under("backbone.", state_dict)
            if not weights:
                raise ValueError("state_dict has no key that starts with 'backbone.'; pass this model's own state_dict")
        if has_lora(self):
            save_lora(self, folder, weights)
        else:
            # Of an earlier model in this folder: it would be put on top of these weights.
            (folder / "adapter_config.json").unlink(missing_ok=True)
            self.backbone.save_pretrained(folder, state_dict=weights)
        # Else tokenizer.json would say what the last call in this process happened to need.
        restore_cut(self.tokenizer, self._cut)
        if padding_shifts(self.tokenizer, self.backbone, self.pooling):
            self.tokenizer.padding_side = "right"
        self.tokenizer.init_kwargs["padding_side"] = self.tokenizer.padding_side
        self.tokenizer.save_pretrained(folder)
        layout = Layout(**{field.name: getattr(self, field.name) for field in fields(Layout)})
        if self.head is None:
            write_layout(folder, layout, self.backbone.config.hidden_size)
        else:
            layers = _under("head.layers.", self.state_dict() if state_dict is None else state_dict)
            write_multi_vector(folder, layout, self.tokenizer, layers)
        (folder / "README.md").write_text(model_card(self), encoding="utf-8")
        for weights_file in folder.glob("**/*.safetensors"):
            # safetensors makes its files for their owner alone, whatever the umask.
            weights_file.chmod((folder / "modules.json").stat().st_mode)


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device without a wait: CUDA copies from pinned memory only while the CPU goes on."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def attended(mask_BT: Tensor) -> Tensor:
    """Return the real tokens, and the first of a text that has none: its softmax would have no terms. It pools to 0."""
    attend_BT = mask_BT.clone()
    attend_BT[:, 0] |= ~mask_BT.any(1)
    return attend_BT


def _check_batch(batch: Mapping[str, Tensor], limit: int | None) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"the batch is a {type(batch).__name__}: expected input_ids and attention_mask, as tokenize(texts) gives"
        )
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
