"""Chunk-by-chunk update of memories, with reads of the live memory."""

from memcache_jax.kernels.chunk_update.api import chunk_update
from memcache_jax.kernels.chunk_update.edges import Edges

__all__ = ["Edges", "chunk_update"]
