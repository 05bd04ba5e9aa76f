"""The contrastive losses of PyLate by their names and arguments there: change the import.

    from inbatch.integrations.pylate import CachedContrastive, Contrastive

Shapes: b rows, T token positions, D dimension.
"""

from typing import Any

import torch
import torch.nn.functional as F
from pylate.losses.contrastive import extract_skiplist_mask  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn

from inbatch.integrations.multi_vector import Cached, MultiVectorMultipleNegativesRankingLoss
from inbatch.integrations.shared import micro_batch_tokens


class Contrastive(MultiVectorMultipleNegativesRankingLoss):
    """InfoNCE of MaxSim scores over the passages of all devices, as PyLate scores them, with the exact gradient.

    temperature as in PyLate, and gather_across_devices, which is False by default there, and whose loss and gradient
    are as many times too large there as there are processes. score_mini_batch_size is not used: no grid of token pairs
    is held. learnable, negatives, group and labels as in `MultiVectorMultipleNegativesRankingLoss`. Raises ValueError
    for another score_metric than MaxSim and for size_average=False.
    """

    def __init__(
        self,
        model: nn.Module,
        score_metric: Any = None,
        score_mini_batch_size: int | None = None,
        size_average: bool = True,
        gather_across_devices: bool = True,
        temperature: float = 1.0,
        **options: Any,
    ):
        if not size_average:
            raise ValueError("size_average=False is not supported: the loss is a mean over the queries; leave it out")
        super().__init__(
            model,
            similarity_fct=score_metric,
            score_mini_batch_size=score_mini_batch_size,
            gather_across_devices=gather_across_devices,
            temperature=temperature,
            **options,
        )

    def _embed(self, features: dict[str, Any], task: str) -> tuple[Tensor, Tensor]:
        states_bTD = F.normalize(self.model(dict(features))["token_embeddings"], dim=-1)
        colbert: Any = getattr(self.model, "module", self.model)
        if task == "document":  # the first of them is taken for queries
            return states_bTD, extract_skiplist_mask([features, features], skiplist=colbert.skiplist)[1]
        mask_bT = features["attention_mask"].bool()
        return states_bTD, torch.ones_like(mask_bT) if colbert.do_query_expansion else mask_bT


class CachedContrastive(Cached, Contrastive):
    """The same loss and gradient in the memory of a micro-batch, by `GradCache`.

    mini_batch_size: memory of so many documents of the model's document_length; None finds a size that fits.
    show_progress_bar is not used.
    """

    def __init__(
        self,
        model: nn.Module,
        score_metric: Any = None,
        mini_batch_size: int | None = None,
        score_mini_batch_size: int | None = None,
        size_average: bool = True,
        gather_across_devices: bool = True,
        show_progress_bar: bool = False,
        temperature: float = 1.0,
        **options: Any,
    ):
        theirs = score_metric, score_mini_batch_size, size_average, gather_across_devices, temperature
        Contrastive.__init__(self, model, *theirs, **options)
        longest = getattr(model, "document_length", 180)
        self.micro_batch_tokens = micro_batch_tokens(
            mini_batch_size, None, longest, show_progress_bar=show_progress_bar
        )
