"""The cache of a memory-caching layer."""

import dataclasses
from typing import Any, ClassVar

import jax

from memcache_jax._typing import Array
from memcache_jax.streaming import Cache
from memcache_jax.streaming.protocol import MixerCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache(MixerCache):
    """A stream's past in one layer."""

    memory: Cache
    tails: Any  # a tuple of the last inputs of each convolution, (b, width - 1, h k)

    nested = ("memory",)
    small = zeroed = ("tails",)
    axes: ClassVar = {"tails": "b . h"}

    @property
    def head_shape(self) -> tuple[int, ...]:
        """Number of heads, and their dimension."""
        return self.memory.key_sum.shape[1::2]

    @property
    def position(self) -> Array:
        """Tokens taken so far by each row, (b,)."""
        return self.memory.position

    @property
    def max_length(self) -> int | None:
        """Most tokens per row; None for any number."""
        return self.memory.config.max_length
