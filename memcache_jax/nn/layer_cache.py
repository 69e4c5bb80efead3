"""The cache of one layer of memory caching."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memcache_jax import _checks
from memcache_jax._typing import Array
from memcache_jax.streaming import Cache


class LayerCache(NamedTuple):
    """A stream's past in one layer.

    Attributes:
      memory: the memory's.
      tails: the last inputs of the convolutions.
    """

    memory: Cache
    tails: tuple[Any, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(x.nbytes for x in jax.tree.leaves(self))

    @property
    def head_shape(self) -> tuple[int, ...]:
        """Heads, and their dimension."""
        return self.memory.key_sum.shape[1::2]

    @property
    def max_length(self) -> int | None:
        """Tokens that a row may take; None for any number."""
        return self.memory.config.max_length

    def reset(self, rows: jax.typing.ArrayLike) -> "LayerCache":
        """The cache with the marked rows (b,) before their first token."""
        marked = jnp.asarray(rows)[:, None, None]
        tails = tuple(jnp.where(marked, 0, tail) for tail in self.tails)
        return LayerCache(self.memory.reset(rows), tails)

    def take(self, rows: jax.typing.ArrayLike) -> "LayerCache":
        """The cache of these rows, in this order; one may come more than once."""
        rows = _checks.check_rows(rows, len(self.memory.position))
        return self.take_small(rows).with_states(self.take_states(rows))

    # For a stack of layers, as in ``Cache``.

    @property
    def states(self) -> tuple:
        """What is large."""
        return self.memory.states

    def with_states(self, states: tuple, first: Any = None) -> "LayerCache":
        """The cache with these, in which its own begin with a row."""
        return self._replace(memory=self.memory.with_states(states, first))

    def empty_states(self, rows: int) -> tuple:
        """So many rows of empty ones."""
        return self.memory.empty_states(rows)

    def reset_states(self, rows: Array) -> tuple:
        """All of them, zero in the marked rows."""
        return self.memory.reset_states(rows)

    def take_states(self, rows: Array) -> tuple:
        """These rows of them, of all."""
        return self.memory.take_states(rows)

    def take_small(self, rows: Array) -> "LayerCache":
        """These rows of all else."""
        tails = tuple(jnp.take(tail, rows, axis=0) for tail in self.tails)
        return LayerCache(self.memory.take_small(rows), tails)
