"""The cache of a memory-caching layer."""

import dataclasses
from typing import Any, ClassVar

import jax

from memcache_jax._typing import Array, Int
from memcache_jax.streaming import Cache
from memcache_jax.streaming.protocol import MixerCache
from memcache_jax.streaming.tails import earlier_tails


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache(MixerCache):
    """A stream's past in one layer.

    Attributes:
      memory: the cache of the memory.
      tails: a tuple of the last inputs of each convolution, (b, width - 1, h k).
      past: a ring of them before each of the last tokens; None where rows cannot go back.
      first: this layer's number in a stack of layers, which share ``past``.
    """

    memory: Cache
    tails: Any
    past: Any = None
    first: Any = None

    nested = ("memory",)
    small = zeroed = ("tails",)
    shared = ("past",)
    axes: ClassVar = {"tails": "b . h", "past": "b . . . h"}

    @property
    def head_shape(self) -> tuple[int, ...]:
        """Number of heads, and their dimension."""
        return self.memory.key_sum.shape[1::2]

    @property
    def position(self) -> Array:
        """Tokens taken so far by each row, (b,)."""
        return self.memory.position

    @property
    def rewindable(self) -> Array | None:
        """By how many tokens each row can go back, (b,); None where none can."""
        return self.memory.rewindable

    def rewound(self, tokens: Int[Array, "b"]) -> "LayerCache":
        """As ``MixerCache.rewound``."""
        memory = self.memory.rewound(tokens)
        places = memory.config.rewind, self.position, memory.position
        tails = earlier_tails(self.tails, self.past, *places, self.first)
        return self.replace(memory=memory, tails=tails)

    @property
    def max_length(self) -> int | None:
        """Most tokens per row; None for any number."""
        return self.memory.config.max_length
