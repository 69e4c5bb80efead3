"""Products of connectors with the pooled keys of segments."""

from memcache_jax.kernels.relevance.api import relevance

__all__ = ["relevance"]
