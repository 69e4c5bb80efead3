"""The history that takes a cache back by tokens: arrays before each token, and replaced states.

A token rewrites the live arrays and, where its segment ends, a few slots. So a cache keeps the live
arrays from before each of the last ``rewind`` tokens, which are therefore written one by one, and
what the slots held before each segment's end among these tokens.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memcache_jax._typing import Array, Bool, Float, Int
from memcache_jax.memories.base import Run
from memcache_jax.memories.pending import Pending
from memcache_jax.streaming.in_place import change_if
from memcache_jax.streaming.loops import Slim
from memcache_jax.streaming.rewind import taken_back
from memcache_jax.streaming.ring import Ring, where_rows
from memcache_jax.streaming.storage import Storage


class Past(NamedTuple):
    """Rings, or their arrays, of a cache with ``rewind``.

    Attributes:
      live: the state, anchor, transition and sum of keys before each token; for memories that defer
        writes, the shares of the pending tokens and the sum of keys.
      chunks: the states that such memories' last chunks began with, and the chunks' tokens; None
        for other memories.
      record: the record of the slots before each token.
      slots: the slots that the end of each segment overwrote, (b, n); ``num_slots`` for none.
      bank: the matrices that those slots held, (b, h, n, in, out).
      pooled: their pooled keys, (b, h, n, k).
    """

    live: Any
    chunks: Any
    record: Any
    slots: Any
    bank: Any
    pooled: Any

    LETTERS = ("b . . h", "b . . h", "b", "b", "b . . h", "b . . h")


def rings_of(cache: Any) -> Past:
    """The rings of a ``streaming.Cache``."""
    config, first = cache.config, cache.first
    size = config.rewind
    live, record = Ring(size, _live(cache), first), Ring(size, cache.record, first)
    chunks = _ring_of_chunks(config, _chunk(cache), first) if config.defers else None
    if not config.slots.num_slots:
        return Past(live, chunks, record, None, None, None)
    return Past(live, chunks, record, *_rings_of_slots(config, *cache.storages))


def _ring_of_chunks(config: Any, rows: Any, first: Any) -> Ring:
    return Ring(-(-config.rewind // config.memory.gradient_chunk), rows, first)


def _rings_of_slots(config: Any, of_states: Storage, of_keys: Storage) -> tuple[Ring, Ring, Ring]:
    """The rings of what segments' ends replaced."""
    ends, first = -(-config.rewind // config.segmentation.size), of_keys.first
    count = config.slots.num_tracks + _merges(config)

    def ring(storage: Storage) -> Ring:
        rows = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((1, len(x), count, *x.shape[1:]), x.dtype),
            storage.state,
        )
        return Ring(ends, rows, first)

    places = jax.ShapeDtypeStruct((1, count), jnp.int32)
    return Ring(ends, places, first), ring(of_states), ring(of_keys)


def empty_past(cache: Any, rows: int, *layers: int) -> Past:
    """Allocates the arrays, for a stack of so many layers."""
    return Past(*(None if x is None else x.empty(rows, *layers) for x in rings_of(cache)))


def remember_token(cache: Any, active: Bool[Array, "b"]) -> Past:
    """Adds the cache's arrays to the history, before active rows take one more token."""
    rings, past = rings_of(cache), cache.past
    at = cache.position[:, None], active[:, None]
    live, record = jax.tree.map(lambda x: x[:, None], (_live(cache), cache.record))
    return past._replace(
        live=rings.live.put(past.live, live, *at),
        record=rings.record.put(past.record, record, *at),
    )


def remember_tokens(
    cache: Any, shares: Any, sums: Float[Array, "b h tracks n k"], taken: Int[Array, "b"]
) -> Past:
    """As ``remember_token``, for the ``taken`` tokens that rows take of one chunk.

    Args:
      cache: the cache before these tokens.
      shares: the pending tokens' shares after each token, (b, h, tracks, n, ...).
      sums: the sums of keys after each token.
      taken: how many of the n tokens each row takes.
    """
    at = _places(cache, sums.shape[3], taken)
    live = jax.tree.map(_before_each, _live(cache), (shares, sums))
    return _with_record(cache, rings_of(cache).live.put(cache.past.live, live, *at), *at)


def remember_writes(
    cache: Any,
    run: Run,
    write: Callable[[Run, Array], Run],
    sums: Float[Array, "b h tracks n k"],
    taken: Int[Array, "b"],
) -> tuple[Run, Past]:
    """As ``remember_tokens``, for states, which are therefore written once per token.

    Args:
      cache: the cache before these tokens.
      run: its runs, some reset, as the first token continues them.
      write: the runs after one more token, that of an index.
      sums: as for ``remember_tokens``.
      taken: as for ``remember_tokens``.

    Returns:
      The runs after these tokens, and the history.
    """
    ring, (*of_runs, of_sums) = rings_of(cache).live, cache.past.live
    at = position, there = _places(cache, sums.shape[3], taken)

    def put(of_runs: Any, run: Run, i: Any) -> Any:
        before = jax.tree.map(lambda x: x[:, None], [run.state, None, run.transition])
        its = (lax.dynamic_slice_in_dim(x, i, 1, axis=1) for x in at)
        return ring.put(of_runs, before, *its)

    def token(i: Array, carry: Slim) -> Slim:
        run, of_runs = carry.full()
        of_runs = put(of_runs, run, i)
        return Slim.of((where_rows(i < taken, write(run, i), run), of_runs))

    # A first token's history has the runs that it resets.
    of_runs = put(of_runs, Run(cache.state, cache.transition), 0)
    first = where_rows(taken > 0, write(run, jnp.int32(0)), run)
    carry = lax.fori_loop(1, sums.shape[3], token, Slim.of((first, of_runs)))
    run, of_runs = carry.full()
    before = _before_each(cache.key_sum, sums)
    live = *of_runs, ring.put(of_sums, before, position, there)
    return run, _with_record(cache, live, *at)


def _places(
    cache: Any, count: int, taken: Int[Array, "b"]
) -> tuple[Int[Array, "b n"], Bool[Array, "b n"]]:
    """The positions of so many tokens, and of which of them the history keeps what was before."""
    ahead = np.arange(count)[None]
    # Only the last ones, so that each place gets at most one.
    there = (ahead < taken[:, None]) & (ahead >= taken[:, None] - cache.config.rewind)
    return cache.position[:, None] + ahead, there


def _before_each(before: Array, after: Array) -> Array:
    """The values before each token, (b, n, ...), from those before and after, (b, h, ...)."""
    return jnp.moveaxis(jnp.concatenate([before[:, :, :, None], after[:, :, :, :-1]], 3), 3, 1)


def _with_record(cache: Any, live: Any, position: Array, there: Array) -> Past:
    """The history with these arrays, and the record, which no token between has changed."""
    count, past = position.shape[1], cache.past
    record = jax.tree.map(
        lambda x: jnp.broadcast_to(x[:, None], (len(x), count, *x.shape[1:])), cache.record
    )
    record = rings_of(cache).record.put(past.record, record, position, there)
    return past._replace(live=live, record=record)


def remember_chunk(cache: Any, complete: Bool[Array, "b"]) -> tuple[Past, Bool[Array, "b"]]:
    """Adds complete chunks to the history, before their tokens are written.

    Returns:
      The history, and the rows to use in place of ``complete``: see ``remember_slots``.
    """
    past = cache.past
    number = cache.position // cache.config.memory.gradient_chunk
    kept, args = (past.chunks, jnp.int32(0)), (cache.first, _chunk(cache), number, complete)
    put = functools.partial(_with_chunks, cache.config)
    chunks, times = change_if(put, complete.any(), kept, args)
    return past._replace(chunks=chunks), complete & (times < 2)


def _with_chunks(
    config: Any,
    kept: tuple[Any, Array],
    first: Any,
    chunk: tuple,
    number: Int[Array, "b"],
    complete: Bool[Array, "b"],
) -> tuple[Any, Array]:
    arrays, times = kept
    rows = jax.tree.map(lambda x: x[:, None], chunk)
    ring = _ring_of_chunks(config, chunk, first)
    return ring.put(arrays, rows, number[:, None], complete[:, None]), times + 1


def remember_slots(
    cache: Any,
    block: Int[Array, "b"],
    ended: Bool[Array, "b"],
    place: Int[Array, "b tracks"],
    merge: Any,
) -> tuple[Past, Int[Array, "b tracks"], Any]:
    """Adds to the history what a block's end overwrites: slots at ``place``, and those that merge.

    Returns:
      The history, and the places and merge to use instead of the arguments. They depend on how
      often the loop has run, so that writes wait for its reads; otherwise XLA would copy the bank.
    """
    args = cache.first, cache.bank, cache.pooled, block, ended, place.astype(jnp.int32), merge
    carry = cache.past[3:], jnp.int32(0)
    again = (storage.made_again for storage in cache.storages)
    put = functools.partial(_with_slots, cache.config, *again)
    of_slots, times = change_if(put, ended.any(), carry, args)
    nowhere = cache.config.slots.num_slots
    place = jnp.where(times < 2, place, nowhere)
    if merge is not None:
        merge = merge._replace(into=jnp.where(times < 2, merge.into, nowhere))
    return Past(*cache.past[:3], *of_slots), place, merge


def _with_slots(
    config: Any,
    states_of: Callable[[Any], Storage],
    keys_of: Callable[[Any], Storage],
    kept: tuple[Any, Array],
    first: Any,
    bank: Any,
    pooled: Any,
    block: Int[Array, "b"],
    ended: Bool[Array, "b"],
    place: Int[Array, "b tracks"],
    merge: Any,
) -> tuple[Any, Array]:
    of_slots, times = kept
    of_states, of_keys = states_of(first), keys_of(first)
    places = [place]
    if _merges(config):
        nowhere = jnp.full(len(block), of_keys.num_slots)
        places.append((nowhere if merge is None else merge.into)[:, None])
    slots = jnp.concatenate(places, axis=1).astype(jnp.int32)
    each = jnp.broadcast_to(slots[:, None], (len(block), len(of_keys.state), slots.shape[1]))
    held = of_states.take(bank, each), of_keys.take(pooled, each)
    put = [
        ring.put(arrays, jax.tree.map(lambda x: x[:, None], rows), block[:, None], ended[:, None])
        for ring, arrays, rows in zip(
            _rings_of_slots(config, of_states, of_keys), of_slots, (slots, *held), strict=True
        )
    ]
    return tuple(put), times + 1


def rewound(cache: Any, tokens: Int[Array, "b"]) -> Any:
    """A cache without the last tokens of each row."""
    rings, past, config = rings_of(cache), cache.past, cache.config
    position, rewindable = taken_back(cache.position, cache.rewindable, tokens)
    moved = (tokens > 0) & (position < cache.position)
    live = where_rows(moved, rings.live.at(past.live, position), _live(cache))
    changes: dict[str, Any] = dict(
        position=position,
        rewindable=rewindable,
        record=where_rows(moved, rings.record.at(past.record, position), cache.record),
    )
    if rings.chunks is None:
        names = "state", "anchor", "transition", "key_sum"
        changes |= dict(zip(names, live, strict=True))
    else:
        chunk = config.memory.gradient_chunk
        number = position // chunk
        crossed = moved & (number < cache.position // chunk)
        put_back = functools.partial(_chunks_back, config)
        args = cache.first, past.chunks, number, crossed
        chunks = change_if(put_back, crossed.any(), _chunk(cache), args)
        (weights, momentum), key_sum = live
        state, inputs, deltas = chunks
        pending = Pending(inputs, deltas, weights, momentum)
        changes |= dict(state=state, pending=pending, key_sum=key_sum)
    if rings.slots is not None:
        segment = config.segmentation.size
        blocks = cache.position // segment, position // segment
        again = (storage.made_again for storage in cache.storages)
        put_back = functools.partial(_slots_back, config, *again)
        args = cache.first, past[3:], *blocks, moved
        undone = (moved & (blocks[1] < blocks[0])).any()
        bank, pooled = change_if(put_back, undone, (cache.bank, cache.pooled), args)
        changes |= dict(bank=bank, pooled=pooled)
    return dataclasses.replace(cache, **changes)


def _chunks_back(
    config: Any, chunk: tuple, first: Any, chunks: Any, number: Int[Array, "b"], rows: Array
) -> tuple:
    """The arrays of ``_chunk``, with those of chunk ``number`` in the marked rows."""
    ring = _ring_of_chunks(config, chunk, first)
    return where_rows(rows, ring.at(chunks, number), chunk)


def _slots_back(
    config: Any,
    states_of: Callable[[Any], Storage],
    keys_of: Callable[[Any], Storage],
    held: tuple[Any, Any],
    first: Any,
    of_slots: tuple,
    now: Int[Array, "b"],
    then: Int[Array, "b"],
    rows: Bool[Array, "b"],
) -> tuple[Any, Any]:
    """The bank and pooled keys, in the marked rows as they were in block ``then``."""
    storages = states_of(first), keys_of(first)
    rings = _rings_of_slots(config, *storages)

    def undo(ago: Array, held: tuple) -> tuple:
        """Puts back what the end of a block replaced, the last one first."""
        block = now - 1 - ago
        places, *rows_of = (ring.at(x, block) for ring, x in zip(rings, of_slots, strict=True))
        slots = jnp.where((rows & (block >= then))[:, None], places, config.slots.num_slots)
        return tuple(
            storage.put(arrays, rows, slots)
            for storage, arrays, rows in zip(storages, held, rows_of, strict=True)
        )

    return lax.fori_loop(0, rings[0].size, undo, held)


def _chunk(cache: Any) -> tuple:
    """The states with which chunks began, and the factors of their tokens."""
    return cache.state, cache.pending.inputs, cache.pending.deltas


def _live(cache: Any) -> tuple:
    if cache.pending is not None:
        return (cache.pending.weights, cache.pending.momentum), cache.key_sum
    return cache.state, cache.anchor, cache.transition, cache.key_sum


def _merges(config: Any) -> bool:
    """Whether a segment's end may merge two states too."""
    eviction = config.eviction
    return eviction is not None and not eviction.drops
