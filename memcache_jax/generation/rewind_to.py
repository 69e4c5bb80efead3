"""Going back to any token of a stream, by the states at segments' ends and the tokens."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from memcache_jax import _checks
from memcache_jax._typing import Array, Bool, Int
from memcache_jax.generation.apart import Frame, apart
from memcache_jax.nn import LanguageModel
from memcache_jax.nn.model_cache import LanguageModelCache
from memcache_jax.streaming.rewind import where_it_lies


def rewind_to(
    model: LanguageModel,
    cache: LanguageModelCache,
    tokens: jax.typing.ArrayLike,
    position: jax.typing.ArrayLike,
) -> LanguageModelCache:
    """Returns the cache as it was after the first ``position`` tokens of each row.

    A row that goes back by at most its ``cache.rewindable`` tokens is rewound. Any other returns to
    where the position's segment begins, from the cached states of earlier segments, and rereads
    the tokens from there on, less than a segment. If layers have segments of several sizes, it
    returns to the last position at which all of them begin one. Convolutions and token shift need
    their inputs there: ``init_cache(..., keep_ends=True)``.

    Args:
      model: the model.
      cache: its cache, which stays the caller's.
      tokens: (b, t) ids that each row has taken, from its first on, at least as far as
        ``position``; those beyond are not looked at.
      position: (b,) how many of a row's tokens stay. They must be known, so not under ``jit``.

    Returns:
      The cache. Outputs that follow are those of a stream that has taken these tokens in calls of
      these sizes, bit for bit, otherwise up to rounding.

    Raises:
      ValueError: for tokens that are not integers (b, t) or too few, positions that are not
        integers (b,) or beyond the cache's, or what the cache does not keep: the buckets that
        ``Logarithmic`` writes over several segments, the borders of ``Adaptive``, states that a
        policy has dropped or merged, the momentum of memories with checkpoint starts, or what
        has left a window. A ``PrefixStore`` keeps whole caches.

    Example:
      >>> import jax.numpy as jnp, memcache_jax as mc
      >>> from flax import nnx
      >>> mixer = mc.nn.MemoryCachingMixer(mc.memories.SSD(), segmentation=mc.Constant(8))
      >>> config = mc.nn.LanguageModelConfig(99, 1, features=8, num_heads=2, mixers=(mixer,))
      >>> model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
      >>> tokens = jnp.arange(60).reshape(2, 30)
      >>> _, cache = model.extend(tokens, model.init_cache(2, 40, keep_ends=True))
      >>> mc.rewind_to(model, cache, tokens, jnp.array([3, 21])).position.tolist()
      [3, 21]
    """
    _checks.check_instance("model", model, LanguageModel, "an mc.nn.LanguageModel")
    _checks.check_instance("cache", cache, LanguageModelCache, "the cache of a LanguageModel")
    ids, then = _checked(model, cache, tokens, position)
    now = np.asarray(cache.position)
    rewindable = 0 if cache.rewindable is None else np.asarray(cache.rewindable)
    near = now - then <= rewindable
    if cache.rewindable is not None:
        cache = cache.rewind(np.where(near, now - then, 0))
    if near.all():
        return cache
    borders = cache.borders(int(now.max()))
    begin = np.where(near, then, borders[np.searchsorted(borders, then, side="right") - 1])
    places = jnp.asarray(begin, jnp.int32), jnp.asarray(~near)
    cache, whole = where_it_lies(_returned, cache, *places, others=1)
    if not np.all(whole):
        lost = np.flatnonzero(~np.asarray(whole)).tolist()
        raise ValueError(
            f"rows {lost} cannot return to {begin[lost].tolist()}: the cache no longer has all "
            "states of the segments before, which a policy has dropped or merged; a larger "
            "max_segments or a PrefixStore keeps them"
        )
    counts = then - begin
    if not counts.any():
        return cache
    size = max(int(np.diff(borders).max(initial=1)) - 1, int(counts.max()))
    place = np.minimum(begin[:, None] + np.arange(size), ids.shape[1] - 1)
    again = np.take_along_axis(ids, place, axis=1).astype(np.int32)
    graph, state = apart(model)
    return _read(state, jnp.asarray(again), jnp.asarray(counts, jnp.int32), cache, graph=graph)


def _checked(
    model: LanguageModel, cache: LanguageModelCache, tokens: Any, position: Any
) -> tuple[Int[np.ndarray, "b t"], Int[np.ndarray, "b"]]:
    """The tokens and positions as NumPy arrays, or ValueError."""
    if any(isinstance(x, Tracer) for x in (tokens, position, cache.position)):
        raise ValueError("rewind_to needs known tokens and positions: call it outside of jit")
    ids, then = _checks.as_numpy("tokens", tokens), _checks.as_numpy("position", position)
    rows = len(cache.position)
    for name, got, shape in (("tokens", ids, (rows, *ids.shape[1:2])), ("position", then, (rows,))):
        axes = "(b, t)" if name == "tokens" else "(b,)"
        rank = 2 if name == "tokens" else 1
        if got.ndim != rank or got.shape != shape or not np.issubdtype(got.dtype, np.integer):
            raise ValueError(
                f"{name} must be integers {axes} of the cache's {rows} rows, got {got.dtype} "
                f"{got.shape}"
            )
    now = np.asarray(cache.position)
    if np.any(then < 0) or np.any(then > now):
        raise ValueError(f"rows have taken {now.tolist()} tokens, cannot return to {then.tolist()}")
    if then.max(initial=0) > ids.shape[1]:
        raise ValueError(
            f"give the tokens that stay, at least {then.max()} of each row, got {ids.shape[1]}"
        )
    stays = ids[np.arange(ids.shape[1]) < then[:, None]]
    if stays.size:
        _checks.check_ids("tokens", int(stays.min()), int(stays.max()), model.config.vocab_size)
    return ids, then


def _returned(
    cache: LanguageModelCache, position: Int[Array, "b"], rows: Bool[Array, "b"]
) -> tuple[LanguageModelCache, Bool[Array, "b"]]:
    return cache.returned(position, rows)


@functools.partial(jax.jit, static_argnames="graph")
def _read(
    state: Any, tokens: Int[Array, "b t"], lengths: Int[Array, "b"], cache: Any, *, graph: Frame
) -> LanguageModelCache:
    return graph.merge(state).extend(tokens, cache, lengths)[1]
