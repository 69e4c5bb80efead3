"""Carrying deep memories through chunks of descent steps."""

from memcache_jax.kernels.deep_update.api import deep_update
from memcache_jax.kernels.deep_update.form import DescentChunk

__all__ = ["DescentChunk", "deep_update"]
