"""Chunk-by-chunk update of memories, with reads of the live memory."""

from memcache_jax.kernels.chunk_update.api import chunk_update

__all__ = ["chunk_update"]
