"""The cache of one layer of memory caching."""

import dataclasses
from typing import Any

import jax

from memcache_jax.streaming import Cache
from memcache_jax.streaming.protocol import MixerCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache(MixerCache):
    """A stream's past in one layer.

    Attributes:
      memory: the memory's cache.
      tails: the last inputs of each convolution, (b, width - 1, h k).
    """

    memory: Cache
    tails: tuple[Any, ...]

    nested = ("memory",)
    small = zeroed = ("tails",)

    @property
    def head_shape(self) -> tuple[int, ...]:
        """Number of heads, and their dimension."""
        return self.memory.key_sum.shape[1::2]

    @property
    def max_length(self) -> int | None:
        """Most tokens per row; None for any number."""
        return self.memory.config.max_length
