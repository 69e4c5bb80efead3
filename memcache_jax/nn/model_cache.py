"""The cache of a language model: the stacked caches of its layers."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memcache_jax import _checks
from memcache_jax._typing import Array, Bool, Int
from memcache_jax.sharding.layout import axes_of, by_compiler
from memcache_jax.streaming.protocol import count_bytes, short_repr, take_rows, zero_rows
from memcache_jax.streaming.rewind import taken_back, taken_back_from


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

    def __repr__(self) -> str:
        return short_repr(self)

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

    @property
    def rewindable(self) -> Array | None:
        """By how many tokens each row can go back, (b,); None where none can."""
        of_layers: list[Any] = [getattr(cache, "rewindable", None) for cache in self.layers]
        if any(one is None for one in of_layers):
            return None
        return functools.reduce(jnp.minimum, (one[0] for one in of_layers))

    def rewind(self, tokens: jax.typing.ArrayLike) -> "LanguageModelCache":
        """Returns the cache as if the last ``tokens`` (b,) of each row had never come.

        See ``MixerCache.rewind``.

        Example:
          >>> import jax.numpy as jnp, memcache_jax as mc
          >>> from flax import nnx
          >>> config = mc.nn.LanguageModelConfig(9, num_layers=1, features=8, num_heads=2)
          >>> model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
          >>> _, cache = model.extend(jnp.ones((2, 6), int), model.init_cache(2, 20, rewind=4))
          >>> cache.rewind(jnp.array([4, 1])).position.tolist()
          [2, 5]
        """
        return taken_back_from(self, tokens, len(self.position))

    def rewound(self, tokens: Int[Array, "b"]) -> "LanguageModelCache":
        """As ``rewind``, of traced values that are not checked."""

        def one(states: Any, layer: tuple) -> tuple[Any, Any]:
            small, number = layer
            cache = small.with_states(states, number).rewound(tokens)
            return cache.states, cache.with_states(jax.tree.map(lambda _: None, cache.states))

        of_mixers = zip(self.layers, self.states, self.repeats, strict=True)
        done = [lax.scan(one, states, (small, jnp.arange(n))) for small, states, n in of_mixers]
        states, layers = map(list, zip(*done, strict=True))
        position, _ = taken_back(self.position, self.layers[0].rewindable[0], tokens)
        return LanguageModelCache(layers, states, position, self.max_length)

    def borders(self, length: int) -> np.ndarray:
        """The positions up to ``length`` at which all layers begin a segment."""
        of_layers = [cache.borders(length) for cache in self.with_states(self.layers)]
        return functools.reduce(np.intersect1d, of_layers)

    def returned(
        self, position: Int[Array, "b"], rows: Bool[Array, "b"]
    ) -> tuple["LanguageModelCache", Bool[Array, "b"]]:
        """As ``MixerCache.returned``."""

        def one(states: Any, layer: tuple) -> tuple[Any, Any]:
            small, number = layer
            cache, whole = small.with_states(states, number).returned(position, rows)
            small = cache.with_states(jax.tree.map(lambda _: None, cache.states))
            return cache.states, (small, whole)

        of_mixers = zip(self.layers, self.states, self.repeats, strict=True)
        done = [lax.scan(one, states, (small, jnp.arange(n))) for small, states, n in of_mixers]
        states, layers = map(list, zip(*done, strict=True))
        layers, whole = map(list, zip(*layers, strict=True))
        position = jnp.where(rows, position, self.position)
        cache = LanguageModelCache(layers, states, position, self.max_length)
        return cache, jnp.concatenate(whole).all(axis=0)

    def put(self, row: jax.typing.ArrayLike, other: "LanguageModelCache") -> "LanguageModelCache":
        """Returns the cache with the one row of another in place of a row.

        Raises:
          ValueError: for a cache of another number of rows than one, or of other shapes.
        """
        return put_row(self.letters(), self, row, other)

    def letters(self) -> "LanguageModelCache":
        """Returns a tree of the letters of each array's axes, as ``MixerCache.letters`` does."""
        small = [cache.letters(layers=True) for cache in self.layers]
        caches = [cache.letters(layers=True) for cache in self.with_states(self.layers)]
        return LanguageModelCache(small, [c.states for c in caches], "b", self.max_length)

    def _first_layers(self) -> list:
        return self.with_states(jax.tree.map(lambda x: x[0], self.layers))


def put_row(letters: Any, cache: Any, row: jax.typing.ArrayLike, other: Any) -> Any:
    """The cache with the one row of another in place of a row, by the letters of its axes."""
    row = jnp.asarray(row)

    def update(axes: str, rows: Any, new: Any) -> Any:
        names = axes.split()
        if "b" not in names:
            return rows
        axis = names.index("b")

        def put(x: Array, y: Array, row: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(x, y, row * y.shape[axis], axis)

        return jax.tree.map(lambda x, y: by_compiler(put, x, y, row, axes=axes_of(x)), rows, new)

    if len(other.position) != 1 or jax.tree.structure(other) != jax.tree.structure(cache):
        raise ValueError(
            f"a row must be a cache of one row made alike, got {len(other.position)} rows"
        )
    return jax.tree.map(update, letters, cache, other)
