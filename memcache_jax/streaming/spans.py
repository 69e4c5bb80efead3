"""A stream's sums of keys: of each track, or of each span of a track's run."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Float, Int
from memcache_jax.engine.types import SpanKeys
from memcache_jax.streaming.slots import Planned


def check_pooling(config: Any, pooling: str, num_keys: int = 1) -> None:
    """Raises ValueError for pooled keys other than those that a cache keeps."""
    kept = config.aggregation.pooling, *(config.spans or (1,))
    if (pooling, num_keys) != kept:
        raise ValueError(
            f"the cache keeps pooled keys of pooling={kept[0]!r} and num_keys={kept[1]}, got "
            f"pooling={pooling!r} and num_keys={num_keys}"
        )


def sums_of(
    cache: Any, block: Int[Array, "b"], key: Float[Array, "b h m k"]
) -> Float[Array, "b h tracks *spans k"]:
    """What the keys of a piece add to a cache's sums."""
    config = cache.config
    if not config.spans:
        return key.sum(axis=2)[:, :, None]
    (num_keys,) = config.spans
    size, slots = config.segmentation.size, config.slots
    begin, length = block[:, None], np.ones((1, 1), int)
    if isinstance(slots, Planned):
        begin, length = slots.runs(block)
    token = cache.position[:, None] - begin * size  # of each track's run
    token = token[..., None] + np.arange(key.shape[2])[None, None]
    span = token // (length * size // num_keys)[..., None]
    own = span[..., None] == np.arange(num_keys)[None, None, None]  # (b, tracks, m, spans)
    # Chosen rather than multiplied: 0 * NaN is NaN.
    return jnp.sum(jnp.where(own[:, None, ..., None], key[:, :, None, :, None], 0), axis=3)


def span_keys(cache: Any, key: Float[Array, "b h 1 m k"], pooling: str, num_keys: int) -> SpanKeys:
    """The keys of the spans of all states, and of the live one up to each token of a piece."""
    config = cache.config
    check_pooling(config, pooling, num_keys)
    size = config.segmentation.size // num_keys
    token = (cache.position % config.segmentation.size)[:, None] + np.arange(key.shape[3])[None]
    span, before = token // size, cache.key_sum[:, :, 0]
    same = (span[:, :, None] == span[:, None]) & np.tri(key.shape[3], dtype=bool)[None]
    number = np.arange(num_keys)[None, None]
    live = jnp.einsum("bts,bhsk->bhtk", same.astype(key.dtype), key[:, :, 0], precision="highest")
    live += jnp.take_along_axis(before, span[:, None, :, None], axis=2)
    own = (span[..., None] == number).astype(key.dtype)
    ended = before + jnp.einsum("btp,bhtk->bhpk", own, key[:, :, 0], precision="highest")
    if pooling == "mean":
        live /= (token % size + 1).astype(live.dtype)[:, None, :, None]
        ended /= size
    seen = number < span[..., None]
    states = cache.storages[1].all(cache.pooled)
    return SpanKeys(live[:, :, None], ended[:, :, None], seen[:, None], states=states)
