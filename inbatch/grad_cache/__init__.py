"""The two-pass training step: `GradCache`."""

from inbatch.grad_cache.step import GradCache as GradCache
