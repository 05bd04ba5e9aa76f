"""Several vectors a text, as ColBERT has them (Khattab and Zaharia 2020): token states, projected and normalised.

Queries may be filled up with mask tokens to a fixed length, whose states count as a token's do. Documents leave out the
tokens of a skip list. `mark` says so in a tensor beside the attention mask; the vectors of what does not count are 0.

Shapes: B texts, T token positions, H width of the backbone, D dimension.
"""

import string
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad
from transformers import PreTrainedTokenizerBase

ROLES = "token_roles"
SCORED, UNSEEN = 1, 2  # 0: it does not count. UNSEEN: it counts, and no other token attends to it
TASKS = ("query", "document")


@dataclass(frozen=True, kw_only=True)
class MultiVector:
    """Say how a text becomes several vectors."""

    dim: int = 128
    """D, of the projection"""
    query_expansion: bool = True
    """fill queries up with mask tokens to the model's query_length"""
    attend_to_expansion: bool = False
    """let the query's tokens attend to these mask tokens"""
    skip_words: tuple[str, ...] = tuple(string.punctuation)
    """tokens of documents that count for nothing"""
    pool_factor: int = 1
    """embedded documents keep a vector for so many tokens: means of similar ones"""
    protected_tokens: int = 1
    """first vectors of a document that are not pooled"""

    def replaced(self, given: Mapping[str, Any]) -> "MultiVector":
        """Return it with what is given and not None; ValueError for an unknown name or a wrong value."""
        names = [field.name for field in fields(self)]
        if unknown := sorted(set(given) - set(names)):
            raise ValueError(f"multi_vector has no {unknown[0]!r}; expected some of {', '.join(names)}")
        made = replace(self, **{name: value for name, value in given.items() if value is not None})
        made = replace(made, skip_words=tuple(made.skip_words))
        for name, least in (("dim", 1), ("pool_factor", 1), ("protected_tokens", 0)):
            number = getattr(made, name)
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise ValueError(f"multi_vector's {name} is {number!r}; expected an integer of at least {least}")
        if made.attend_to_expansion and not made.query_expansion:
            raise ValueError("multi_vector's attend_to_expansion means nothing without query_expansion: leave it out")
        return made


class TokenVectors(nn.Module):
    """v_t = normalise(W h_t) for the states h_t of the tokens that count, 0 for the others.

    layers: the projection, one or several nn.Linear. Raises ValueError where queries cannot be expanded.
    """

    def __init__(self, layers: nn.Sequential, options: MultiVector, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.layers = layers
        mask_id = tokenizer.mask_token_id
        self._expansion_id: Any = tokenizer.eos_token_id if mask_id is None else mask_id
        if options.query_expansion and (self._expansion_id is None or tokenizer.padding_side == "left"):
            why = "pads on the left" if tokenizer.padding_side == "left" else "has neither a mask nor an eos token"
            raise ValueError(
                f"queries cannot be expanded: the tokenizer {why}; set multi_vector's query_expansion false"
            )
        ids: Any = tokenizer.convert_tokens_to_ids(list(options.skip_words))
        usable = {i for i, word in zip(ids, options.skip_words, strict=True) if word == tokenizer.unk_token}
        unknown: Any = tokenizer.unk_token_id
        usable |= set(ids) - {None, unknown}
        self._skipped = torch.tensor(sorted(usable), dtype=torch.int64)

    def mark(
        self, tokens: Mapping[str, Tensor], task: str, options: MultiVector, query_length: int | None
    ) -> dict[str, Tensor]:
        """Return the tokens of a task with ROLES int64 [B, T]; queries [B, at least query_length] if they expand."""
        ids_BT, mask_BT = tokens["input_ids"], tokens["attention_mask"]
        if task == "document":
            roles_BT = (mask_BT.bool() & ~torch.isin(ids_BT, self._skipped)).long()
            return {"input_ids": ids_BT, "attention_mask": mask_BT, ROLES: roles_BT}
        roles_BT = mask_BT.long()
        if options.query_expansion and query_length is not None:
            missing = max(0, query_length - ids_BT.shape[1])
            ids_BT, mask_BT, roles_BT = (pad(tensor, (0, missing)) for tensor in (ids_BT, mask_BT, roles_BT))
            added_BT = (mask_BT == 0) & (torch.arange(ids_BT.shape[1]) < query_length)
            ids_BT = ids_BT.masked_fill(added_BT, self._expansion_id)
            roles_BT = roles_BT.masked_fill(added_BT, SCORED if options.attend_to_expansion else UNSEEN)
            mask_BT = mask_BT.masked_fill(added_BT, 1)
        return {"input_ids": ids_BT, "attention_mask": mask_BT, ROLES: roles_BT}

    def forward(self, states_BTH: Tensor, counts_BT: Tensor) -> Tensor:
        """Return [B, T, D], float32 (float64 for float64)."""
        vectors_BTD = self.layers(states_BTH.to(next(self.layers.parameters()).dtype))
        vectors_BTD = normalize(vectors_BTD.to(torch.promote_types(vectors_BTD.dtype, torch.float32)), dim=-1)
        return vectors_BTD.masked_fill(~counts_BT[..., None], 0.0)
