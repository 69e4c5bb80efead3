"""The next tokens of a stream."""

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from memcache_jax import _checks
from memcache_jax._checks import check_arguments
from memcache_jax._eager import compiled
from memcache_jax._typing import Array, Float, Int, Start
from memcache_jax._varying import alike
from memcache_jax.adaptive import Adaptive
from memcache_jax.aggregation import Aggregation
from memcache_jax.engine.run import full_controls, widen
from memcache_jax.engine.types import Tokens
from memcache_jax.memories import Memory
from memcache_jax.segmentation import Segmentation
from memcache_jax.sharding.division import Division
from memcache_jax.sharding.layout import check_not_mapped_over
from memcache_jax.streaming.cache import Cache
from memcache_jax.streaming.steps import taken


def extend(
    cache: Cache,
    query: Float[Array, "b t h k"],
    key: Float[Array, "b t h k"],
    value: Float[Array, "b t h v"],
    connector: Float[Array, "b t h u"] | None = None,
    *,
    controls: Mapping[str, Array] | None = None,
    border: Float[Array, "b t h"] | None = None,
    lengths: Int[Array, "b"] | None = None,
    memory: Memory | None = None,
    weights: Mapping[str, Array] | None = None,
    aggregation: Aggregation | None = None,
    segmentation: Segmentation | None = None,
    start: Start | None = None,
) -> tuple[Float[Array, "b t h v"], Cache]:
    """Takes the next tokens of a stream, with the outputs that ``memory_caching`` gives them.

    Any split of a sequence into calls gives the outputs of one call over the whole. A call takes
    the tokens of a chunk at once; a rule of your own takes those that do not fill a chunk one by
    one, unless it states ``takes_padding``. It compiles once per number of tokens. Donate the
    cache, and none of its arrays is copied::

        step = jax.jit(mc.extend, donate_argnums=0)

    Args:
      cache: from ``init_cache`` or an earlier call.
      query: as for ``memory_caching``, and so are the next five.
      key: where a token writes.
      value: what a token writes.
      connector: what a token's gates compare with pooled keys.
      controls: the rule's per-token coefficients.
      border: logits of borders, for ``Adaptive(by="scores")``; they get no gradient in streams.
      lengths: how many of each row's tokens count, from the first on; all by default. Outputs of
        the others are zero.
      memory: what the cache was made for, like the last three; checked if given.
      weights: initial weights of a deep memory for segments that begin from here on, by default
        those that the cache was made with. Pass them if they need gradients after
        ``stop_gradient`` of the cache.
      aggregation: see memory.
      segmentation: see memory.
      start: see memory.

    Returns:
      The outputs, and the cache after the last token.

    Raises:
      ValueError: for a cache of another configuration, arguments that do not fit each other or the
        cache, or more tokens than a row has room for. The cache is then unchanged. Under ``jit``
        room cannot be checked: outputs beyond it are NaN. Any row has room for 2^31 - 1 tokens at
        most, then it must be reset.

    Example:
      >>> import jax, memcache_jax as mc
      >>> q, k, v, u = jax.random.normal(jax.random.key(0), (4, 2, 100, 4, 16))
      >>> rule = dict(memory=mc.memories.LinearAttention(), aggregation=mc.GRM(),
      ...             segmentation=mc.Constant(32))
      >>> cache = mc.init_cache(2, 4, 16, 16, **rule, max_segments=3)
      >>> start, cache = mc.extend(cache, q[:, :90], k[:, :90], v[:, :90], u[:, :90])
      >>> rest, cache = mc.extend(cache, q[:, 90:], k[:, 90:], v[:, 90:], u[:, 90:], **rule)
      >>> whole = mc.memory_caching(q, k, v, u, **rule)
      >>> bool(abs(rest - whole[:, 90:]).max() < 1e-4)
      True
    """
    arguments: dict[str, Any] = dict(
        controls=controls,
        border=border,
        lengths=lengths,
        memory=memory,
        weights=weights,
        aggregation=aggregation,
        segmentation=segmentation,
        start=start,
    )
    return extend_in_group(cache, query, key, value, connector, **arguments)[:2]


def extend_in_group(
    cache: Cache,
    query: Array,
    key: Array,
    value: Array,
    connector: Array | None = None,
    *,
    controls: Mapping[str, Array] | None = None,
    border: Array | None = None,
    lengths: Any = None,
    memory: Memory | None = None,
    weights: Mapping[str, Array] | None = None,
    aggregation: Aggregation | None = None,
    segmentation: Segmentation | None = None,
    start: Start | None = None,
    hands_on: bool = False,
) -> tuple[Array, Cache, Array | None]:
    """As ``extend``; also returns what each token chose, if SSC ``hands_on`` that."""
    _checks.check_instance("cache", cache, Cache, "what mc.init_cache or mc.extend returns")
    config = cache.config
    config.check_same(
        memory=memory, aggregation=aggregation, segmentation=segmentation, start=start
    )
    memory, controls = config.memory, _checks.check_mapping("controls", controls)
    check_arguments(
        *(query, key, value, connector, memory, controls, None),
        *(config.aggregation, config.segmentation, None),
    )
    heads, *dims = cache.sizes
    for name, rows, dim in zip(("key", "value"), (key, value), dims, strict=True):
        axes = f"b, t, h, {name[0]} of the cache"
        _checks.check_shape(name, rows, (*key.shape[:2], heads, dim), axes)
    _checks.check_room(cache.position, key.shape[:2], lengths, config.max_length)
    _checks.check_border(border, config.segmentation, key)
    if weights is not None:
        cache = cache.with_weights(_checks.check_mapping("weights", weights))
    counts = jnp.full(len(query), query.shape[1]) if lengths is None else jnp.asarray(lengths)
    some: Any = connector  # or None, which has no arrays to divide
    cache, tokens, counts = alike(
        (cache, Tokens(query, key, value, some, controls, border), counts)
    )
    rows = ((x, "b . h .") for x in (query, key, value, connector))
    division = Division.of(*rows, (cache.position, "b"), (cache.key_sum, "b h"))
    if division is None:
        return compiled(_extend, cache, tokens, counts, hands_on=hands_on)
    # On the host a row's heads lie side by side, and all decide together where segments end.
    if config.placement == "host" or isinstance(config.segmentation, Adaptive):
        division = division.whole("h")
    row: Any = "b . h ."
    of_controls: Any = {
        name: memory.controls[name].axes.replace("t", ".") for name in tokens.controls
    }
    of_cache = cache.letters()
    of_border = None if border is None else "b . h"
    letters = of_cache, Tokens(row, row, row, row, of_controls, of_border), "b"
    run, out = functools.partial(_extend, hands_on=hands_on), (row, of_cache.alone(), None)
    out = (*out[:2], row) if hands_on else out
    return division.run(run, (cache, tokens, counts), letters, out)


def _extend(
    cache: Cache, tokens: Tokens, lengths: Int[Array, "b"], hands_on: bool = False
) -> tuple[Array, Cache, Array | None]:
    """``extend`` on one device."""
    check_not_mapped_over()
    memory, value = cache.config.memory, tokens.value
    full = full_controls(memory, tokens.controls, tokens.key, tokens.value)
    tokens = widen(**tokens._replace(controls=full)._asdict(), dtype=cache.key_sum.dtype)
    count = tokens.key.shape[2]
    lengths = jnp.minimum(lengths, count)  # traced lengths have not been checked
    # Outputs of the other tokens are dropped, but gradients would pass through NaN in their reads.
    counts = (jnp.arange(count)[None] < lengths[:, None])[:, None, :, None]
    query, connector = (jnp.where(counts, x, 0) for x in (tokens.query, tokens.connector))
    tokens = tokens._replace(query=query, connector=connector)

    start = cache.position
    cache, (y, chosen) = taken(hands_on, cache, tokens, lengths)
    # At the largest position nothing advances: the call's remaining tokens are not taken.
    token, room = jnp.arange(count)[None], _checks.LARGEST - start[:, None]
    beyond = (token >= room) & (token < lengths[:, None])
    y = jnp.where(beyond[:, None, :, None], jnp.nan, y)
    y = jnp.moveaxis(y, 1, 2).astype(value.dtype)
    return y, cache.alone(), None if chosen is None else jnp.moveaxis(chosen, 1, 2)
