"""The bi-encoder: a backbone with pooling, opened from and saved as sentence-transformers folders."""

import transformers
from packaging.version import Version

# Ministral 3, padded on the left or packed, had other embeddings before, without an error.
if Version(transformers.__version__).release < (5, 8):
    raise ImportError(f"inbatch needs transformers 5.8 or later, got {transformers.__version__}: upgrade it")

from inbatch.encoder.model import BiEncoderModel

__all__ = ["BiEncoderModel"]
