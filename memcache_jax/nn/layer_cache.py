"""The cache of a memory-caching layer."""

import dataclasses
from typing import Any, ClassVar

import jax
import numpy as np

from memcache_jax._typing import Array, Bool, Int
from memcache_jax.streaming import Cache
from memcache_jax.streaming.protocol import MixerCache
from memcache_jax.streaming.tails import earlier_tails, tails_at


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache(MixerCache):
    """A stream's past in one layer.

    Attributes:
      memory: the cache of the memory.
      tails: a tuple of the last inputs of each convolution, (b, width - 1, h k).
      past: a ring of them before each of the last tokens; None where rows cannot go back.
      first: this layer's number in a stack of layers, which share ``past`` and ``ends``.
      ends: a ring of tails at segments' ends, with ``keep_ends``; else None.
    """

    memory: Cache
    tails: Any
    past: Any = None
    first: Any = None
    ends: Any = None

    nested = ("memory",)
    small = zeroed = ("tails",)
    shared = ("past", "ends")
    axes: ClassVar = {"tails": "b . h", "past": "b . . . h", "ends": "b . . . h"}

    @property
    def head_shape(self) -> tuple[int, ...]:
        """Number of heads, and their dimension."""
        shape = self.memory.key_sum.shape
        return shape[1], shape[-1]

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

    def borders(self, length: int) -> np.ndarray:
        """As ``MixerCache.borders``."""
        found = self.memory.borders(length)
        if self.ends is None and jax.tree.leaves(self.tails):
            raise ValueError(
                "cannot return to a segment's begin without the last inputs of convolutions there: "
                "make the cache with init_cache(..., keep_ends=True), or use a PrefixStore"
            )
        return found

    def returned(
        self, position: Int[Array, "b"], rows: Bool[Array, "b"]
    ) -> tuple["LayerCache", Bool[Array, "b"]]:
        """As ``MixerCache.returned``."""
        memory, whole = self.memory.returned(position, rows)
        tails = tails_at(self.tails, self.ends, memory.config, position, rows, self.first)
        return self.replace(memory=memory, tails=tails), whole

    @property
    def max_length(self) -> int | None:
        """Most tokens per row; None for any number."""
        return self.memory.config.max_length
