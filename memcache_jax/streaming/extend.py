"""The next tokens of a stream."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memcache_jax import _checks
from memcache_jax._arguments import check_arguments
from memcache_jax._typing import Array, Bool, Float, Int, Matrices, State
from memcache_jax.aggregation import Aggregation
from memcache_jax.caching import Start, exact_chunk, full_controls
from memcache_jax.memories import Memory
from memcache_jax.segmentation import Segmentation
from memcache_jax.streaming import storage
from memcache_jax.streaming.cache import Cache
from memcache_jax.streaming.slots import Merge, Reads


def extend(
    cache: Cache,
    query: Float[Array, "b t h k"],
    key: Float[Array, "b t h k"],
    value: Float[Array, "b t h v"],
    connector: Float[Array, "b t h u"] | None = None,
    *,
    controls: Mapping[str, Array] | None = None,
    lengths: Int[Array, "b"] | None = None,
    memory: Memory | None = None,
    weights: Mapping[str, Array] | None = None,
    aggregation: Aggregation | None = None,
    segmentation: Segmentation | None = None,
    start: Start | None = None,
) -> tuple[Float[Array, "b t h v"], Cache]:
    """The next tokens of a stream: the outputs that ``memory_caching`` has for them.

    Any split of a sequence into calls gives the outputs of one call over the whole. A call of fewer
    tokens than a chunk writes them one by one; a longer one writes whole chunks, and one by one
    what comes before the first and after the last. It compiles once per number of tokens. Donate
    the cache, and none of its arrays is copied::

        step = jax.jit(mc.extend, donate_argnums=0)

    Args:
      cache: from ``init_cache`` or an earlier call.
      query: as for ``memory_caching``, and so are the next four.
      key: where a token writes.
      value: what a token writes.
      connector: what a token's gates compare with pooled keys.
      controls: the rule's per-token coefficients.
      lengths: tokens of each row that count, the first ones; all by default. Outputs of the others
        are zero.
      memory: what the cache was made for, as are the last three: checked where it is given.
      weights: initial weights of a deep memory, by default those that the cache was made with.
        Segments that begin from here on begin with them, and only where they are given do they get
        gradients after ``stop_gradient`` of the cache.
      aggregation: see memory.
      segmentation: see memory.
      start: see memory.

    Returns:
      The outputs, and the cache after the last token.

    Raises:
      ValueError: for a cache of another configuration, arguments that do not fit each other or the
        cache, or more tokens than a row has room for. The cache is then as it was. Under ``jit``
        positions are not known, and outputs beyond are NaN.

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
    config = cache.config
    config.check_same(
        memory=memory, aggregation=aggregation, segmentation=segmentation, start=start
    )
    memory, controls = config.memory, dict(controls or {})
    check_arguments(
        query,
        key,
        value,
        connector,
        memory,
        controls,
        None,
        config.aggregation,
        config.segmentation,
        None,
    )
    _check_fits(cache, key, value, lengths)
    cache = cache if weights is None else cache.with_weights(weights)
    connector = jnp.zeros_like(query) if connector is None else connector
    tokens = (query, key, value, connector, full_controls(memory, controls, key))
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x.astype(cache.key_sum.dtype), 2, 1), tokens)
    count = query.shape[1]
    lengths = jnp.full(len(query), count) if lengths is None else lengths

    block = config.segmentation.size
    chunk = memory.gradient_chunk
    if chunk is None:
        chunk = exact_chunk(block, config.max_length or 2 * block, memory.largest_chunk)
    y = jnp.zeros((*key.shape[:1], key.shape[2], count, value.shape[-1]), cache.key_sum.dtype)
    carry = (cache, jnp.zeros(len(query), jnp.int32), y)
    single = functools.partial(_advance, tokens, lengths, chunk, 1)
    if count >= chunk > 1:
        whole = functools.partial(_advance, tokens, lengths, chunk, chunk)

        def some(carry: tuple) -> tuple:
            return _repeat(whole, count // chunk, _repeat(single, chunk - 1, carry))

        # First to the end of the chunk that was begun, and chunks; then what is left.
        cache, _, y = _repeat(some, 2, carry)
    else:
        cache, _, y = _repeat(single, count, carry)
    return jnp.moveaxis(y, 1, 2).astype(value.dtype), cache


def _repeat(advance: Any, times: int, carry: tuple) -> tuple:
    if times == 1:
        return advance(carry)
    return lax.scan(lambda carry, _: (advance(carry), None), carry, length=times)[0]


def _advance(
    tokens: tuple, lengths: Int[Array, "b"], chunk: int, size: int, carry: tuple
) -> tuple[Cache, Array, Array]:
    """Takes a whole chunk in the rows that can, or one token in those that cannot."""
    cache, done, y = carry
    whole = (cache.position % chunk == 0) & (done + chunk <= lengths)
    active = whole if size == chunk else ~whole & (done < lengths)

    def go(cache: Cache, y: Array) -> tuple[Cache, Array]:
        # Beyond a row's last token the slice is moved back, and not active.
        piece = jax.tree.map(
            lambda x: jax.vmap(lambda x, begin: lax.dynamic_slice_in_dim(x, begin, size, axis=1))(
                x, done
            ),
            tokens,
        )
        new, out = _take_piece(cache, piece, active)
        place = jnp.where(active, done, y.shape[2])[:, None] + jnp.arange(size)[None]
        put = jax.vmap(lambda y, out, place: y.at[:, place].set(out, mode="drop"))
        return new, put(y, out, place)

    cache, y = lax.cond(active.any(), go, lambda cache, y: (cache, y), cache, y)
    return cache, done + size * active, y


def _take_piece(
    cache: Cache, piece: tuple, active: Bool[Array, "b"]
) -> tuple[Cache, Float[Array, "b h m v"]]:
    """Tokens (b, h, m, ...) that lie in one chunk: the outputs, and the cache after them."""
    config, slots = cache.config, cache.config.slots
    memory, aggregation = config.memory, config.aggregation
    query, key, value, connector, controls = piece
    size = query.shape[2]
    block, into_block = jnp.divmod(cache.position, config.segmentation.size)
    begins = (into_block == 0)[:, None] & slots.begins(block)

    state, anchor, key_sum = cache.state, cache.anchor, cache.key_sum
    restart = begins if config.start == "independent" else (cache.position == 0)[:, None]
    state = jax.tree.map(
        lambda old, new: _where(restart, jnp.broadcast_to(new[None, :, None], old.shape), old),
        state,
        cache.initial,
    )
    if memory.gradient_chunk:
        anew = (cache.position % memory.gradient_chunk == 0)[:, None]
        anchor = jax.tree.map(lambda new, old: _where(anew, new, old), state, anchor)
    key_sum = _where(begins, jnp.zeros_like(key_sum), key_sum)

    def write(state: State, anchor: State, key: Any, value: Any, controls: Any) -> Any:
        return memory.write(state, state if anchor is None else anchor, key, value, controls)

    tracks = jax.vmap(write, in_axes=(0, 0, None, None, None))
    ends, chunks = jax.vmap(jax.vmap(tracks))(state, anchor, key, value, controls)
    live = jax.vmap(jax.vmap(functools.partial(aggregation.live, memory)))(
        jax.tree.map(lambda x: x[:, :, 0], chunks), query
    )
    reads = slots.reads(cache.record, block)
    before = cache.position - slots.first(block) * config.segmentation.size
    scores = _scores(cache, key_sum[:, :, 0], before, connector, key, reads)
    y, read = _read(cache, query, live, scores, reads)
    complete = active & (into_block + size == config.segmentation.size)
    if config.max_length is not None:
        # Tokens beyond a row's room have NaN for outputs, and what they write is not kept.
        left = (config.max_length - cache.position)[:, None]
        inside = jnp.arange(size)[None] < left
        y, complete = jnp.where(inside[:, None, :, None], y, jnp.nan), complete & inside[:, -1]

    key_sum += key.sum(axis=2)[:, :, None]
    keep = functools.partial(_where, active[:, None])
    cache = dataclasses.replace(
        cache,
        position=cache.position + size * active,
        state=jax.tree.map(keep, ends, cache.state),
        anchor=jax.tree.map(keep, anchor, cache.anchor),
        key_sum=keep(key_sum, cache.key_sum),
        record=slots.count_reads(cache.record, jnp.where(active[:, None], read, 0)),
    )
    return _store(cache, block, complete, after=y), y


def _scores(
    cache: Cache,
    key_sum: Float[Array, "b h k"],
    before: Int[Array, "b"],
    connector: Float[Array, "b h m u"],
    key: Float[Array, "b h m k"],
    reads: Reads,
) -> tuple[Float[Array, "b h m r"], Float[Array, "b h m"]]:
    """Relevance of the states that a piece may read, and of the live one.

    Of the live segment there have been ``before`` tokens, and the sum of their keys.
    """
    aggregation, shape = cache.config.aggregation, (*key.shape[:3], reads.slots.shape[1])
    if aggregation.gate == "content":
        if cache.config.slots.reads_all:
            pooled = _keys(cache).all(cache.pooled, len(key))
        else:
            slots = jnp.broadcast_to(reads.slots[:, None], (*key.shape[:2], shape[-1]))
            pooled = _keys(cache).take(cache.pooled, slots)
        cached = jnp.einsum("bhmk,bhrk->bhmr", connector, pooled, precision="highest")
        keys = key_sum[:, :, None] + jnp.cumsum(key, axis=2)
        if aggregation.pooling == "mean":
            counts = before[:, None] + jnp.arange(1, key.shape[2] + 1)[None]
            keys /= counts.astype(keys.dtype)[:, None, :, None]
        online = jnp.vecdot(connector, keys, precision="highest")
    elif aggregation.gate == "position":
        distance = jnp.clip(reads.distances, 0, connector.shape[-1] - 1)
        cached = jnp.take_along_axis(connector, distance[:, None, None], axis=-1)
        online = connector[..., 0]
    else:
        cached, online = jnp.zeros(shape, key.dtype), jnp.zeros(shape[:3], key.dtype)
    # A state of n segments counts n times.
    cached += jnp.log(jnp.maximum(reads.segments, 1).astype(cached.dtype))[:, None, None]
    return jnp.where((reads.slots >= 0)[:, None, None], cached, -jnp.inf), online


def _read(
    cache: Cache,
    query: Float[Array, "b h m k"],
    live: Any,
    scores: tuple[Float[Array, "b h m r"], Float[Array, "b h m"]],
    reads: Reads,
) -> tuple[Float[Array, "b h m v"], Float[Array, "b r"]]:
    """The outputs, and the sum of each cached state's gates over heads and tokens.

    They are reads of the live memory and of the cached ones, or of their mixture.
    """
    config, (batch, heads, size, _) = cache.config, query.shape
    aggregation, (cached, online), width = config.aggregation, scores, reads.slots.shape[1]
    few = min(width, getattr(aggregation, "top_k", width))
    combine = functools.partial(aggregation.combine, config.memory)
    live = jax.tree.map(lambda x: x[:, :, None, None], live)
    if config.placement == "device" and size * few >= width:
        gates = aggregation.gates(cached, online)
        bank = storage.unpack(_states(cache).all(cache.bank, batch), query.dtype)
        # The gates of empty slots are zero.
        which = np.arange(width)[None] if config.slots.reads_all else reads.slots[:, None]
        block = jax.tree.map(lambda x: x[:, :, None], gates)
        y = combine(bank, query[:, :, None], live, block, which)[:, :, 0]
        return y, gates[0].sum(axis=(1, 2))
    # The states that each token selects, side by side; a token is a block of its own.
    _, chosen = lax.top_k(lax.stop_gradient(cached), few)
    gates = aggregation.gates(jnp.take_along_axis(cached, chosen, axis=-1), online)
    places = jnp.broadcast_to(jnp.maximum(reads.slots, 0)[:, None, None], cached.shape)
    places = jnp.take_along_axis(places, chosen, axis=-1).reshape(batch, heads, -1)
    bank = storage.unpack(_states(cache).take(cache.bank, places), query.dtype)
    # What lies in a slot that is not read may be anything, NaN too, and its gate is zero.
    seen = jnp.take_along_axis((cached > -jnp.inf), chosen, axis=-1).reshape(places.shape)
    bank = jax.tree.map(lambda x: jnp.where(seen[..., None, None], x, 0), bank)
    each = np.arange(size * few).reshape(size, few)
    blocks = gates[0][:, :, :, None], gates[1][..., None]
    y = combine(bank, query[:, :, :, None], live, blocks, each)[:, :, :, 0]
    sums = jax.vmap(lambda place, gate: jnp.zeros(width, gate.dtype).at[place].add(gate))
    return y, sums(chosen.reshape(batch, -1), gates[0].reshape(batch, -1))


def _store(cache: Cache, block: Int[Array, "b"], ends: Bool[Array, "b"], after: Array) -> Cache:
    """Puts the states of the runs that end here into their slots, where reads are done with."""
    config, slots = cache.config, cache.config.slots
    if not slots.num_slots:
        return cache
    # An array that is read and then written is copied, unless the second needs the first.
    most = lax.stop_gradient(after).max()
    ends &= ~(most > jnp.maximum(most, 0))
    record, place, merge = slots.store(cache.record, block, ends)
    states, pooled = cache.state, cache.key_sum
    if config.start == "checkpoint":  # every run's state is the running one
        shape = pooled.shape[:3]
        states = jax.tree.map(lambda x: jnp.broadcast_to(x, (*shape, *x.shape[3:])), states)
    if config.aggregation.pooling == "mean":
        pooled /= slots.tokens(block).astype(pooled.dtype)[:, None, :, None]
    states, pooled = config.memory.matrices(states), (pooled,)
    bank, keys = cache.bank, (cache.pooled,)
    of_states, of_keys = _states(cache), _keys(cache)
    if merge is not None:
        bank, keys = lax.cond(
            (merge.into < slots.num_slots).any(),
            lambda bank, keys: (
                _merge(merge, of_states, bank, states),
                _merge(merge, of_keys, keys, pooled),
            ),
            lambda *kept: kept,
            *(bank, keys),
        )
    (keys,) = of_keys.put(keys, pooled, place)
    bank = of_states.put(bank, storage.pack(states, config.cache_dtype), place)
    return dataclasses.replace(cache, bank=bank, pooled=keys, record=record)


def _merge(merge: Merge, bank: storage.Bank, kept: Any, new: Matrices) -> Any:
    """What is kept, with two states of each row, or one and the new one, made one."""
    dtype = jax.tree.leaves(kept)[0].dtype
    heads = new[0].shape[1]

    def at(place: Array) -> Matrices:
        slots = jnp.broadcast_to(place[:, None, None], (len(place), heads, 1))
        return storage.unpack(bank.take(kept, slots), new[0].dtype)

    def mean(one: Array, other: Array, new: Array) -> Array:
        shape = (-1, *[1] * (new.ndim - 1))
        weight = (merge.of_into.astype(new.dtype) / merge.segments).reshape(shape)
        other = jnp.where((merge.other == bank.num_slots).reshape(shape), new, other)
        return weight * one + (1 - weight) * other

    means = jax.tree.map(mean, at(merge.into), at(merge.other), new)
    return bank.put(kept, storage.pack(means, dtype), merge.into[:, None])


def _states(cache: Cache) -> Any:
    return cache.config.states(cache.initial, 0 if cache.first is None else cache.first)


def _keys(cache: Cache) -> storage.DeviceBank:
    return cache.config.keys(cache.key_sum, 0 if cache.first is None else cache.first)


def _where(rows: Bool[Array, "b ..."], new: Array, old: Array) -> Array:
    """``new`` in the marked rows and tracks, of arrays (b, h, tracks, ...)."""
    mask = rows.reshape(rows.shape[0], 1, rows.shape[1], *[1] * (new.ndim - 3))
    return jnp.where(mask, new, old)


def _check_fits(cache: Cache, key: Array, value: Array, lengths: Array | None) -> None:
    """Raises ValueError unless the tokens are of the cache's sizes and find room."""
    heads, key_dim, value_dim = cache.sizes
    for name, rows, dim in (("key", key, key_dim), ("value", value, value_dim)):
        axes = f"b, t, h, {name[0]} of the cache"
        _checks.check_shape(name, rows, (*key.shape[:2], heads, dim), axes)
    _checks.check_room(cache.position, key.shape[:2], lengths, cache.config.max_length)
