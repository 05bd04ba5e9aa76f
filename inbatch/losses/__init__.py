"""The loss over the passages of all ranks: `info_nce`, its module form, objectives and statistics; distillation."""

from inbatch.losses.distill import distill, match_vectors
from inbatch.losses.info_nce import info_nce
from inbatch.losses.masking import FalseNegatives
from inbatch.losses.module import InfoNCELoss
from inbatch.losses.objective import CLIP, GTE, QWEN3_EMBEDDING, Objective
from inbatch.losses.stats import LossStats

__all__ = [
    "CLIP",
    "GTE",
    "QWEN3_EMBEDDING",
    "FalseNegatives",
    "InfoNCELoss",
    "LossStats",
    "Objective",
    "distill",
    "info_nce",
    "match_vectors",
]
