"""The ranking losses of sentence-transformers' MultiVectorEncoder, by their names and arguments: change the import.

Shapes: B rows, N passages of a row (positive first), T token positions, D dimension.
"""

import warnings
from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inbatch.integrations.shared import TrainerLoss, ids_of, micro_batch_tokens


class MultiVectorMultipleNegativesRankingLoss(TrainerLoss):
    """InfoNCE of MaxSim scores over the passages of all devices, without their grid of token pairs in memory.

    scale (None: 1), gather_across_devices as in sentence-transformers, where the latter is False by default;
    mini_batch_size and score_mini_batch_size, which save memory there, are not used. options (temperature, learnable,
    negatives, impl, group) and labels as in `MultipleNegativesRankingLoss`. Raises ValueError for a similarity_fct:
    MaxSim is the one.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        scale: float | None = None,
        similarity_fct: Any = None,
        mini_batch_size: int | None = None,
        score_mini_batch_size: int | None = None,
        gather_across_devices: bool = True,
        **options: Any,
    ):
        if similarity_fct is not None:
            raise ValueError(f"similarity_fct {similarity_fct!r} is not supported: leave it out for MaxSim")
        for name, given in (("mini_batch_size", mini_batch_size), ("score_mini_batch_size", score_mini_batch_size)):
            if given is not None:
                warnings.warn(f"{name} is not used: no grid of token pairs is held", stacklevel=2)
        if type(getattr(model, "module", model)).__name__ == "SentenceTransformer":
            raise ValueError("the losses for a SentenceTransformer are in inbatch.integrations.sentence_transformers")
        super().__init__(model, scale=scale, usual_scale=1.0, gather_across_devices=gather_across_devices, **options)

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """Return the loss of the columns (query, positive, negatives...), 0-d."""
        columns = [self._embed(one, task) for one, task in zip(sentence_features, _tasks(), strict=False)]
        return self._of_columns(*columns, labels=labels)

    def _embed(self, features: dict[str, Any], task: str) -> tuple[Tensor, Tensor]:
        """Return the tokens' vectors [b, T, D] and which of them count [b, T]."""
        column = self.model(features, task=features.get("task", task))
        return column["token_embeddings"], column["attention_mask"].bool()

    def _of_columns(self, *columns: tuple[Tensor, Tensor], labels: Tensor | None = None) -> Tensor:
        queries, *passages = columns
        if not passages:
            raise ValueError("the loss needs two columns or more, (query, positive, negatives...), got one")
        longest = max(mask_BT.shape[1] for _, mask_BT in passages)
        missing = [longest - mask_BT.shape[1] for _, mask_BT in passages]
        states = [F.pad(states_BTD, (0, 0, 0, n)) for (states_BTD, _), n in zip(passages, missing, strict=True)]
        masks = [F.pad(mask_BT, (0, n)) for (_, mask_BT), n in zip(passages, missing, strict=True)]
        return self.loss(
            queries[0],
            torch.stack(states, dim=1).flatten(0, 1),
            query_mask=queries[1],
            passage_mask=torch.stack(masks, dim=1).flatten(0, 1),
            false_negatives=ids_of(labels, len(queries[0]), len(passages)),
        )


def _tasks() -> Iterator[str]:
    return chain(["query"], repeat("document"))


class Cached(MultiVectorMultipleNegativesRankingLoss):
    """The loss of a subclass's `_embed`, and its gradient, in the memory of a micro-batch, by `GradCache`."""

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """Return the loss, whose backward encodes a second time."""
        columns = [
            {"column": task, **{_SHOWN.get(name, name): value for name, value in features.items()}}
            for features, task in zip(sentence_features, _tasks(), strict=False)
        ]
        return self._cached(self._states, self._of_states, columns, labels)

    def _states(self, features: dict[str, Any]) -> Tensor:
        """Return the tokens' vectors, with zeros for those that do not count."""
        given = {_HIDDEN.get(name, name): value for name, value in features.items() if name != "column"}
        states_BTD, mask_BT = self._embed(given, features["column"])
        return states_BTD * mask_BT[..., None]

    def _of_states(self, *columns: Tensor, labels: Tensor | None = None) -> Tensor:
        return self._of_columns(*((states_BTD, (states_BTD != 0).any(-1)) for states_BTD in columns), labels=labels)


# Under its name GradCache would cut what an attention mask leaves out, and a query's expansion is such.
_SHOWN = {"attention_mask": "mask_of_tokens"}
_HIDDEN = {"mask_of_tokens": "attention_mask"}


class CachedMultiVectorMultipleNegativesRankingLoss(Cached):
    """The same loss and gradient in the memory of a micro-batch, by `GradCache`.

    mini_batch_size: of so many rows of the model's max_seq_length; mini_batch_num_tokens: of so many tokens, in its
    place. Without either GradCache finds a size that fits. show_progress_bar is not used.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mini_batch_size: int | None = None,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        **options: Any,
    ):
        super().__init__(model, **options)
        longest = getattr(getattr(model, "module", model), "max_seq_length", None)
        self.micro_batch_tokens = micro_batch_tokens(
            mini_batch_size, mini_batch_num_tokens, longest, show_progress_bar=show_progress_bar
        )
