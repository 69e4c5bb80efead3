"""The cache of a language model: those of its layers, and what they share."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from memcache_jax import _checks


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("layers", "states", "position"),
    meta_fields=("max_length",),
)
@dataclasses.dataclass(frozen=True)
class LanguageModelCache:
    """A stream's past in a language model, as a pytree.

    Attributes:
      layers: of each mixer, the caches of its layers but for their states, stacked.
      states: of each mixer, the states that all its layers share, (layers * b, ...).
      position: tokens that each row has taken, (b,).
      max_length: tokens that a row may take; None for any number.
    """

    layers: list
    states: list
    position: Any
    max_length: int | None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(x.nbytes for x in jax.tree.leaves(self))

    @property
    def depth(self) -> tuple[int, int]:
        """Layers, and the mixers that they repeat."""
        return self._repeats * len(self.layers), len(self.layers)

    def check_room(self, shape: tuple[int, ...], lengths: Any = None) -> None:
        """Raises ValueError unless tokens (b, t) go on where the rows are, and have room.

        ``lengths`` of them count in each row. What is traced is not known.
        """
        _checks.check_room(self.position, shape, lengths, self.max_length)

    def reset(self, rows: jax.typing.ArrayLike) -> "LanguageModelCache":
        """The cache with the marked rows (b,) before their first token."""
        layers = jax.vmap(lambda caches: [cache.reset(rows) for cache in caches])(self.layers)
        every = jnp.tile(jnp.asarray(rows), self._repeats)
        states = [cache.reset_states(every) for cache in self._with_states()]
        position = jnp.where(jnp.asarray(rows), 0, self.position)
        return LanguageModelCache(layers, states, position, self.max_length)

    def take(self, rows: jax.typing.ArrayLike) -> "LanguageModelCache":
        """The cache of these rows, in this order; one may come more than once."""
        batch = len(self.position)
        rows = _checks.check_rows(rows, batch)
        layers = jax.vmap(lambda caches: [cache.take_small(rows) for cache in caches])(self.layers)
        every = (jnp.arange(self._repeats)[:, None] * batch + rows[None]).reshape(-1)
        states = [cache.take_states(every) for cache in self._with_states()]
        position = jnp.take(self.position, rows, axis=0)
        return LanguageModelCache(layers, states, position, self.max_length)

    @property
    def _repeats(self) -> int:
        return len(jax.tree.leaves(self.layers)[0])

    def _with_states(self) -> list:
        """Of each mixer, a layer's cache with the states of all."""
        return [
            jax.tree.map(lambda x: x[0], cache).with_states(shared)
            for cache, shared in zip(self.layers, self.states, strict=True)
        ]


def without_states(cache: Any) -> Any:
    """A mixer's cache without its states."""
    return cache.with_states((None, None))
