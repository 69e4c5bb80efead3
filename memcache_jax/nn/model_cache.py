"""The cache of a language model: the stacked caches of its layers."""

import dataclasses
from typing import Any

import jax

from memcache_jax import _checks
from memcache_jax.streaming.protocol import count_bytes, take_rows, zero_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LanguageModelCache:
    """A stream's past in a language model, as a pytree.

    Attributes:
      layers: for each mixer, the small arrays of its layers' caches, stacked.
      states: for each mixer, the large arrays that its layers share, (layers, b, ...).
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
    def repeats(self) -> tuple[int, ...]:
        """Number of layers of each mixer."""
        return tuple(len(jax.tree.leaves(cache)[0]) for cache in self.layers)

    def check_room(self, shape: tuple[int, ...], lengths: Any = None) -> None:
        """Raises ValueError unless the rows have room for tokens (b, t).

        ``lengths`` of them count in each row. Positions traced under ``jit`` are not checked.
        """
        _checks.check_room(self.position, shape, lengths, self.max_length)

    def with_states(self, layers: list) -> list:
        """Returns one cache per mixer, of these layers, with the arrays that all layers share."""
        return [c.with_states(states) for c, states in zip(layers, self.states, strict=True)]

    def reset(self, rows: jax.typing.ArrayLike) -> "LanguageModelCache":
        """Returns the cache with the marked rows (b,) empty again."""
        rows = _checks.check_marks(rows, len(self.position))
        layers = [jax.vmap(lambda cache: cache.reset(rows))(cache) for cache in self.layers]
        states = [cache.reset_states(rows, axis=1) for cache in self._first_layers()]
        return LanguageModelCache(layers, states, zero_rows(self.position, rows), self.max_length)

    def take(self, rows: jax.typing.ArrayLike) -> "LanguageModelCache":
        """Returns the cache of these rows, in this order; a row may be taken more than once."""
        rows = _checks.check_rows(rows, len(self.position))
        layers = [jax.vmap(lambda cache: cache.take_small(rows))(cache) for cache in self.layers]
        states = [cache.take_states(rows, axis=1) for cache in self._first_layers()]
        return LanguageModelCache(layers, states, take_rows(self.position, rows), self.max_length)

    def letters(self) -> "LanguageModelCache":
        """Returns a tree of the letters of each array's axes, as ``MixerCache.letters`` does."""
        small = [cache.letters(layers=True) for cache in self.layers]
        caches = [cache.letters(layers=True) for cache in self.with_states(self.layers)]
        return LanguageModelCache(small, [c.states for c in caches], "b", self.max_length)

    def _first_layers(self) -> list:
        return self.with_states(jax.tree.map(lambda x: x[0], self.layers))
