"""Gated read of the memory states that each row has chosen."""

from memcache_jax.kernels.grouped_read.api import grouped_read

__all__ = ["grouped_read"]
