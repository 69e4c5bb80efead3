"""Write rules: how a memory is written, and how it is read."""

from memcache_jax.memories.base import Control, Memory
from memcache_jax.memories.deep import Titans
from memcache_jax.memories.matrix import LinearAttention

__all__ = ["Control", "LinearAttention", "Memory", "Titans"]
