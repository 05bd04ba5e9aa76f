"""The bi-encoder: a backbone with pooling, opened from and saved as sentence-transformers folders."""

from inbatch.encoder.model import BiEncoderModel

__all__ = ["BiEncoderModel"]
