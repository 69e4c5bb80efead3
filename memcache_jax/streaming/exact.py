"""Exact tokens of a stream: all of the live segment, then the worst recalled of each segment.

A bank holds the kept keys and values of a state after its matrices, as two more matrices.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memcache_jax._typing import Array, Bool, Int, Matrices
from memcache_jax.engine.exact import longest_segment, stored_exact, worst_recalled
from memcache_jax.engine.types import Exact, Tokens
from memcache_jax.streaming import storage


class Recent(NamedTuple):
    """The last tokens of each row; the token at position p is in place p % size.

    Attributes:
      key: their keys, NaN for a token that was not finite.
      value: their values.
    """

    key: Any  # (b, h, size, k)
    value: Any  # (b, h, size, v)


def num_recent(config: Any) -> int:
    """How many tokens to hold, so that the longest segment is there even after ``rewind``."""
    return longest_segment(config.segmentation) + config.rewind


def empty_recent(config: Any, *sizes: int, dtype: Any) -> Recent | None:
    """Zeros, for sizes (b, h, k, v); None if no tokens are kept."""
    if not keeps_tokens(config):
        return None
    *rows, key_dim, value_dim = sizes
    shapes = ((*rows, num_recent(config), dim) for dim in (key_dim, value_dim))
    return Recent(*(jnp.zeros(shape, dtype) for shape in shapes))


def keeps_tokens(config: Any) -> bool:
    """Whether tokens are kept beside cached states."""
    return bool(config.aggregation.exact and config.slots.num_slots)


def remember(
    cache: Any, tokens: Tokens, bad: Bool[Array, "b h 1 m"], counted: Bool[Array, "b *m"]
) -> Recent | None:
    """The recent tokens after adding those of (b, h, 1, m, ...) that count."""
    if cache.recent is None:
        return None
    size, count = cache.recent.key.shape[2], tokens.key.shape[3]
    place = (cache.position[:, None] + np.arange(count)[None]) % size
    place = jnp.where(counted, place, size)

    def put(kept: Array, new: Array) -> Array:
        of_row = jax.vmap(lambda kept, new, place: kept.at[:, place].set(new, mode="drop"))
        return of_row(kept, new[:, :, 0].astype(kept.dtype), place)

    key = jnp.where(bad[..., None], jnp.nan, tokens.key)
    return Recent(put(cache.recent.key, key), put(cache.recent.value, tokens.value))


def with_worst(
    cache: Any, matrices: Matrices, block: Int[Array, "b"], ends: Bool[Array, "b"]
) -> tuple:
    """Matrices (b, h, 1, ...) as a bank holds them, followed by the worst-recalled tokens."""
    if cache.recent is None:
        return tuple(matrices)
    config, recent = cache.config, cache.recent
    segment = config.segmentation.size
    first = config.slots.first(cache.record, block) * segment
    after = (block + 1) * segment

    def choose(matrices: Matrices, recent: Recent) -> tuple[Array, Array]:
        place = first[:, None] + np.arange(longest_segment(config.segmentation))[None]
        there = (place < after[:, None])[:, None]
        take = jax.vmap(lambda x, place: x[:, place])
        key, value = (take(x, place % x.shape[2])[:, :, None] for x in recent)
        count = config.aggregation.exact
        return worst_recalled(config.memory, matrices, key, value, there, count)

    def nothing(matrices: Matrices, recent: Recent) -> tuple[Array, Array]:
        shapes = jax.eval_shape(choose, matrices, recent)
        key, value = (jnp.zeros_like(x, shape=y.shape) for x, y in zip(recent, shapes, strict=True))
        return key, value

    return *matrices, *lax.cond(ends.any(), choose, nothing, tuple(matrices), recent)


def token_shapes(config: Any, *sizes: int, dtype: Any) -> tuple:
    """The shapes of the tokens kept beside one state, for sizes (h, k, v)."""
    if not keeps_tokens(config):
        return ()
    heads, *dims = sizes
    shape = heads, config.aggregation.exact
    return tuple(jax.ShapeDtypeStruct((*shape, dim), dtype) for dim in dims)


def matrices_of(cache: Any) -> Any:
    """The matrices in ``cache.bank``, without what is kept beside them."""
    return cache.bank[: len(cache.config.memory.matrices(cache.initial))]


def exact_of(cache: Any, dtype: Any) -> Exact | None:
    """The tokens beside all cached states."""
    if cache.recent is None:
        return None
    stored, first = cache.storages[0], len(matrices_of(cache))
    kept = cache.bank[first : first + 2]

    def take(states: Int[Array, "b h m"]) -> tuple[Array, Array]:
        return stored_exact(*storage.unpack(stored.take(kept, states), dtype))

    every = stored_exact(*storage.unpack(stored.all(kept), dtype))
    return Exact(*every, longest_segment(cache.config.segmentation), take=take)
