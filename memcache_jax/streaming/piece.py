"""Tokens of one chunk: what they write, read and store."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memcache_jax._typing import Array, Bool, Float, Int, Matrices, State
from memcache_jax.streaming import storage
from memcache_jax.streaming.cache import Cache
from memcache_jax.streaming.slots import Merge, Reads


def take_piece(
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
        # 0 * NaN is NaN: in a gradient, what lies in slots that are not read.
        pooled = jnp.where((reads.slots >= 0)[:, None, :, None], pooled, 0)
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
