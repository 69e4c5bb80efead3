"""The cache of a language model: the stacked caches of its layers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from memcache_jax import _checks
from memcache_jax._typing import Array
from memcache_jax.streaming.protocol import Stack, count_bytes, take_rows, zero_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LanguageModelCache:
    """A stream's past in a language model, as a pytree.

    Attributes:
      layers: for each mixer, the small arrays of its layers' caches, stacked.
      states: for each mixer, the large arrays that its layers share, (layers * b, ...).
      position: tokens taken so far by each row, (b,).
      max_length: most tokens per row; None for any number.
    """

    layers: list
    states: list
    position: Any
    max_length: int | None = dataclasses.field(metadata=dict(static=True))

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return count_bytes(self)

    @property
    def stacks(self) -> list[Stack]:
        """For each mixer, the caches of its layers."""
        repeats = len(jax.tree.leaves(self.layers)[0])
        pairs = zip(self.layers, self.states, strict=True)
        return [Stack(small, states, repeats) for small, states in pairs]

    @property
    def depth(self) -> tuple[int, int]:
        """Number of layers, and of mixers."""
        return sum(stack.layers for stack in self.stacks), len(self.layers)

    def check_room(self, shape: tuple[int, ...], lengths: Any = None) -> None:
        """Raises ValueError unless the rows have room for tokens (b, t).

        ``lengths`` of them count in each row. Positions traced under ``jit`` are not checked.
        """
        _checks.check_room(self.position, shape, lengths, self.max_length)

    def reset(self, rows: jax.typing.ArrayLike) -> "LanguageModelCache":
        """Returns the cache with the marked rows (b,) empty again."""
        rows = jnp.asarray(rows)
        stacks = [stack.reset(rows) for stack in self.stacks]
        return self._replace(stacks, zero_rows(self.position, rows))

    def take(self, rows: jax.typing.ArrayLike) -> "LanguageModelCache":
        """Returns the cache of these rows, in this order; a row may be taken more than once."""
        batch = len(self.position)
        rows = _checks.check_rows(rows, batch)
        stacks = [stack.take(rows, batch) for stack in self.stacks]
        return self._replace(stacks, take_rows(self.position, rows))

    def _replace(self, stacks: list[Stack], position: Array) -> "LanguageModelCache":
        small, states = ([getattr(x, name) for x in stacks] for name in ("small", "states"))
        return LanguageModelCache(small, states, position, self.max_length)
