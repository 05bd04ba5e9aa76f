"""The loss over the passages of all ranks: `info_nce`, its module form, objectives and statistics; distillation."""

from inbatch.losses.distill import distill as distill
from inbatch.losses.distill import match_vectors as match_vectors
from inbatch.losses.info_nce import info_nce as info_nce
from inbatch.losses.masking import FalseNegatives as FalseNegatives
from inbatch.losses.module import InfoNCELoss as InfoNCELoss
from inbatch.losses.objective import CLIP as CLIP
from inbatch.losses.objective import GTE as GTE
from inbatch.losses.objective import QWEN3_EMBEDDING as QWEN3_EMBEDDING
from inbatch.losses.objective import Objective as Objective
from inbatch.losses.stats import LossStats as LossStats
