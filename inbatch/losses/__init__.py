"""The loss over the passages of all ranks: `info_nce`, its module form, its objectives and its statistics."""

from inbatch.losses.info_nce import info_nce
from inbatch.losses.masking import FalseNegatives
from inbatch.losses.module import InfoNCELoss
from inbatch.losses.objective import CLIP, GTE, QWEN3_EMBEDDING, Objective
from inbatch.losses.stats import LossStats

__all__ = ["CLIP", "GTE", "QWEN3_EMBEDDING", "FalseNegatives", "InfoNCELoss", "LossStats", "Objective", "info_nce"]
