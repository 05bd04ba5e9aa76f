"""Exact, fast, memory-flat in-batch negatives across any number of GPUs, for training bi-encoders in PyTorch."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inbatch.collectives import all_gather as all_gather
    from inbatch.collectives import max_over_ranks as max_over_ranks
    from inbatch.encoder import BiEncoderModel as BiEncoderModel
    from inbatch.grad_cache import GradCache as GradCache
    from inbatch.losses import FalseNegatives as FalseNegatives
    from inbatch.losses import InfoNCELoss as InfoNCELoss
    from inbatch.losses import LossStats as LossStats
    from inbatch.losses import Objective as Objective
    from inbatch.losses import info_nce as info_nce
    from inbatch.retrieval.mine import mine as mine

# Public name -> module. Resolved on first use, so that `import inbatch` costs nothing and needs only torch.
_PUBLIC = {
    "BiEncoderModel": "inbatch.encoder",
    "FalseNegatives": "inbatch.losses",
    "GradCache": "inbatch.grad_cache",
    "InfoNCELoss": "inbatch.losses",
    "LossStats": "inbatch.losses",
    "Objective": "inbatch.losses",
    "all_gather": "inbatch.collectives",
    "info_nce": "inbatch.losses",
    "max_over_ranks": "inbatch.collectives",
    "mine": "inbatch.retrieval.mine",
}

__all__ = [*_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]
__version__ = "0.2.0.dev0"


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'inbatch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
