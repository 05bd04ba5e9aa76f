"""The ranking loss of sentence-transformers' MultiVectorEncoder by its name and arguments there: change the import.

Shapes: B rows, N passages of a row (positive first), T token positions, D dimension.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from inbatch.integrations.sentence_transformers import ids_of
from inbatch.losses import InfoNCELoss


class MultiVectorMultipleNegativesRankingLoss(nn.Module):
    """InfoNCE of MaxSim scores over the passages of all devices, without their grid of token pairs in memory.

    scale, gather_across_devices as in sentence-transformers, where the latter is False by default; mini_batch_size and
    score_mini_batch_size, which save memory there, are not used. temperature, learnable, negatives, impl, group and
    labels as in `MultipleNegativesRankingLoss`. Raises ValueError for a similarity_fct: MaxSim is the one.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        scale: float = 1.0,
        similarity_fct: Any = None,
        mini_batch_size: int | None = None,
        score_mini_batch_size: int | None = None,
        gather_across_devices: bool = True,
        temperature: float | None = None,
        learnable: bool = False,
        negatives: str | None = None,
        group: ProcessGroup | None = None,
    ):
        super().__init__()
        if similarity_fct is not None:
            raise ValueError(f"similarity_fct {similarity_fct!r} is not supported: leave it out for MaxSim")
        for name, given in (("mini_batch_size", mini_batch_size), ("score_mini_batch_size", score_mini_batch_size)):
            if given is not None:
                warnings.warn(f"{name} is not used: no grid of token pairs is held", stacklevel=2)
        self.model = model
        self.loss = InfoNCELoss(
            1 / scale if temperature is None else temperature,
            learnable=learnable,
            negatives=negatives or ("gather" if gather_across_devices else "local"),
            group=group,
        )

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """Return the loss of the columns (query, positive, negatives...), 0-d."""
        columns = [
            self.model(features, task=features.get("task", "document" if number else "query"))
            for number, features in enumerate(sentence_features)
        ]
        queries, *passages = [(column["token_embeddings"], column["attention_mask"].bool()) for column in columns]
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

    def get_config_dict(self) -> dict[str, Any]:
        """Return what the model card says of the loss."""
        return {"temperature": float(self.loss.temperature), "negatives": self.loss.negatives, "masks": "by ids"}
