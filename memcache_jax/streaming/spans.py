"""A stream's sums of keys: of each track, or of each span of a track's run."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Float, Int
from memcache_jax.engine.types import SpanKeys
from memcache_jax.streaming.slots import Decided


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
    begin, size = _runs(cache, block)
    token = cache.position[:, None] - begin * config.segmentation.size  # of each track's run
    token = token[..., None] + np.arange(key.shape[2])[None, None]
    own = (token // size[..., None])[..., None] == np.arange(*config.spans)[None, None, None]
    # Chosen rather than multiplied: 0 * NaN is NaN.  own: (b, tracks, m, spans)
    return jnp.sum(jnp.where(own[:, None, ..., None], key[:, :, None, :, None], 0), axis=3)


def pooled_of(cache: Any, block: Int[Array, "b"]) -> Float[Array, "b h tracks *spans k"]:
    """The pooled keys of the runs that end with a block."""
    config, slots, sums = cache.config, cache.config.slots, cache.key_sum
    tokens = slots.tokens(cache.record, block)
    if config.spans:
        span, (_, size) = np.arange(*config.spans)[None, None], _runs(cache, block)
        if isinstance(slots, Decided):  # spans beyond a segment's end get the last one's key
            span = jnp.minimum(span, (tokens - 1)[..., None] // size[..., None])
            sums = jnp.take_along_axis(sums, span[:, None, ..., None], axis=3)
        else:  # a track without a state has fewer tokens than keys
            size = jnp.maximum(tokens // config.aggregation.num_keys, 1)
        tokens = jnp.clip(tokens[..., None] - span * size[..., None], 1, size[..., None])
    if config.aggregation.pooling == "sum":
        return sums
    return sums / tokens[:, None, ..., None].astype(sums.dtype)


def span_keys(cache: Any, key: Float[Array, "b h 1 m k"], pooling: str, num_keys: int) -> SpanKeys:
    """The keys of the spans of all states, and of the live one up to each token of a piece."""
    config = cache.config
    check_pooling(config, pooling, num_keys)
    block = cache.position // config.segmentation.size
    begin, size = (x[:, :1] for x in _runs(cache, block))
    token = cache.position[:, None] - begin * config.segmentation.size
    token += np.arange(key.shape[3])[None]
    span, before = token // size, cache.key_sum[:, :, 0]
    same = (span[:, :, None] == span[:, None]) & np.tri(key.shape[3], dtype=bool)[None]
    number = np.arange(num_keys)[None, None]
    live = jnp.einsum("bts,bhsk->bhtk", same.astype(key.dtype), key[:, :, 0], precision="highest")
    live += jnp.take_along_axis(before, span[:, None, :, None], axis=2)
    own = (span[..., None] == number).astype(key.dtype)
    ended = before + jnp.einsum("btp,bhtk->bhpk", own, key[:, :, 0], precision="highest")
    if pooling == "mean":
        live /= (token % size + 1).astype(live.dtype)[:, None, :, None]
        ended /= size.astype(ended.dtype)[:, None, :, None]
    seen = number < span[..., None]
    states = cache.storages[1].all(cache.pooled)
    return SpanKeys(live[:, :, None], ended[:, :, None], seen[:, None], states=states)


def _runs(cache: Any, block: Int[Array, "b"]) -> tuple[Array, Array]:
    """The first block of the runs (b, tracks) that a block lies in, and the tokens of a span."""
    config = cache.config
    begin, most = config.slots.runs(cache.record, block)
    return begin, jnp.asarray(most * config.segmentation.size // config.aggregation.num_keys)
