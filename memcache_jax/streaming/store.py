"""Storing the states of runs that end: in free slots, or in slots that a policy frees."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from memcache_jax._typing import Array, Bool, Int
from memcache_jax.streaming import storage
from memcache_jax.streaming.cache import Cache
from memcache_jax.streaming.config import CacheConfig
from memcache_jax.streaming.eviction import Merge
from memcache_jax.streaming.exact import with_worst
from memcache_jax.streaming.in_place import change_if
from memcache_jax.streaming.maps import compose, maps_of
from memcache_jax.streaming.past import remember_slots
from memcache_jax.streaming.spans import pooled_of


def once_read(after: Array, rows: Bool[Array, "b"]) -> Bool[Array, "b"]:
    """The rows, made to depend on ``after``.

    XLA copies an array that is read and written, unless the write depends on the read.
    """
    most = lax.stop_gradient(after).max()
    return rows & ~(most > jnp.maximum(most, 0))


def store(
    cache: Cache,
    block: Int[Array, "b"],
    ends: Bool[Array, "b"],
    after: Array,
    keeps: Bool[Array, "b"] | None,
) -> Cache:
    """Stores the states of the runs that end here, once ``after`` has been read.

    In the rows that ``keeps`` marks, what they replace is remembered for ``rewind``.
    """
    config, slots = cache.config, cache.config.slots
    if not slots.num_slots or config.borrows:
        return cache
    before, ends = cache, once_read(after, ends)
    record, place, merge = slots.store(cache.record, block, ends, cache.key_sum)
    if keeps is not None:
        past, place, merge = remember_slots(cache, block, keeps, place, merge)
        cache = dataclasses.replace(cache, past=past)
    states, pooled = cache.state, pooled_of(before, block)
    if config.start == "checkpoint":  # all tracks have the same state
        shape = pooled.shape[:3]
        states = jax.tree.map(lambda x: jnp.broadcast_to(x, (*shape, *x.shape[3:])), states)
    pooled = jnp.where(jnp.isfinite(pooled), pooled, jnp.nan)  # as in one pass: gates are unknown
    states = with_worst(before, config.memory.matrices(states), block, ends)
    if config.keeps_maps:
        states = *states, *maps_of(cache.transition)
    of_states, of_keys = cache.storages
    put = functools.partial(_stored, config, of_states.made_again, of_keys.made_again)
    kept, args = (cache.bank, cache.pooled), (cache.first, states, pooled, place, merge)
    if config.placement == "host":
        bank, keys = put(kept, *args)
    else:
        bank, keys = change_if(put, ends.any(), kept, args)
    return dataclasses.replace(cache, bank=bank, pooled=keys, record=record)


def _stored(
    config: CacheConfig,
    states_of: Callable[[Any], storage.Storage],
    keys_of: Callable[[Any], storage.Storage],
    kept: tuple[Any, Any],
    first: Any,
    states: Any,
    pooled: Array,
    place: Int[Array, "b tracks"],
    merge: Merge | None,
) -> tuple[Any, Any]:
    """The bank and pooled keys with states at their places, after others have merged."""
    of_states, of_keys = states_of(first), keys_of(first)
    bank, keys = kept
    if merge is not None:

        def merged(bank: Any, keys: Any) -> tuple[Any, Any]:
            join, join_keys = _joins(config, merge)
            return (
                _merge(merge, join, of_states, bank, states),
                _merge(merge, join_keys, of_keys, keys, pooled),
            )

        any_row = (merge.into < of_states.num_slots).any()
        bank, keys = lax.cond(any_row, merged, lambda *kept: kept, bank, keys)
    bank = of_states.put(bank, storage.pack(states, config.cache_dtype), place)
    keys = of_keys.put(keys, pooled, place)
    if config.tree is not None:
        keys = config.tree.with_nodes(of_keys, keys, of_states.num_slots, place)
    return bank, keys


def _joins(config: CacheConfig, merge: Merge) -> tuple[Callable, Callable]:
    """How an older and a newer state of each row become one, and likewise their pooled keys."""

    def mean(one: Any, other: Any) -> Any:
        def of(one: Array, other: Array) -> Array:
            weight = merge.of_into.astype(one.dtype) / merge.segments
            weight = weight.reshape(-1, *[1] * (one.ndim - 1))
            return weight * one + (1 - weight) * other

        return jax.tree.map(of, one, other)

    if config.eviction is None or not config.eviction.composes:
        return mean, mean
    keys = mean if config.aggregation.pooling == "mean" else jnp.add
    if config.keeps_maps:
        return functools.partial(compose, config.memory), keys
    return lambda one, other: other, keys  # with checkpoint starts the newer state holds both


def _merge(merge: Merge, join: Callable, bank: storage.Storage, kept: Any, new: Any) -> Any:
    """Merges two kept states of each row, or a kept one and the new one."""
    dtype, like = jax.tree.leaves(kept)[0].dtype, jax.tree.leaves(new)[0]

    def at(place: Array) -> Any:
        slots = jnp.broadcast_to(place[:, None, None], (len(place), like.shape[1], 1))
        return storage.unpack(bank.take(kept, slots), like.dtype)

    is_new = merge.other == bank.num_slots
    other = jax.tree.map(
        lambda kept, new: jnp.where(is_new.reshape(-1, *[1] * (new.ndim - 1)), new, kept),
        *(at(merge.other), new),
    )
    return bank.put(kept, storage.pack(join(at(merge.into), other), dtype), merge.into[:, None])
