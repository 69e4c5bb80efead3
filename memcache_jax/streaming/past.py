"""What takes a cache back by tokens: its arrays before each of them, and the states they replaced.

A token writes the live arrays anew and, where its segment ends, a few slots. So a cache keeps the
live arrays before each of the last ``rewind`` tokens, which are therefore written one by one, and
what the slots held before each of the segments' ends among them.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memcache_jax._typing import Array, Bool, Int
from memcache_jax.streaming.rewind import taken_back
from memcache_jax.streaming.ring import Ring, where_rows
from memcache_jax.streaming.storage import Storage


class Past(NamedTuple):
    """Rings, or their arrays, of a cache with ``rewind``.

    Attributes:
      live: the state, anchor, transition and sum of keys before each token.
      record: the record of the slots before each token.
      slots: those that the end of each segment replaced, (b, n); ``num_slots`` for none.
      bank: the matrices that were there, (b, h, n, in, out).
      pooled: and their pooled keys, (b, h, n, k).
    """

    live: Any
    record: Any
    slots: Any
    bank: Any
    pooled: Any

    LETTERS = ("b . . h", "b", "b", "b . . h", "b . . h")


def rings_of(cache: Any) -> Past:
    """The rings of a ``streaming.Cache``."""
    config, first = cache.config, cache.first
    size, slots = config.rewind, config.slots
    live, record = Ring(size, _live(cache), first), Ring(size, cache.record, first)
    if not slots.num_slots:
        return Past(live, record, None, None, None)
    ends = -(-size // config.segmentation.size)
    count = slots.num_tracks + _merges(config)

    def ring(storage: Storage) -> Ring:
        rows = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((1, len(x), count, *x.shape[1:]), x.dtype),
            storage.state,
        )
        return Ring(ends, rows, first)

    places = jax.ShapeDtypeStruct((1, count), jnp.int32)
    return Past(live, record, Ring(ends, places, first), *map(ring, cache.storages))


def empty_past(cache: Any, rows: int, *layers: int) -> Past:
    """Allocates the arrays, for a stack of so many layers."""
    return Past(*(None if x is None else x.empty(rows, *layers) for x in rings_of(cache)))


def remember_token(cache: Any, active: Bool[Array, "b"]) -> Past:
    """What is kept once one more token comes to active rows of this cache."""
    rings, past = rings_of(cache), cache.past
    at = cache.position[:, None], active[:, None]
    live, record = jax.tree.map(lambda x: x[:, None], (_live(cache), cache.record))
    return past._replace(
        live=rings.live.put(past.live, live, *at),
        record=rings.record.put(past.record, record, *at),
    )


def remember_slots(
    cache: Any,
    block: Int[Array, "b"],
    ended: Bool[Array, "b"],
    place: Int[Array, "b tracks"],
    merge: Any,
) -> tuple[Past, Int[Array, "b tracks"], Any]:
    """What is kept once the slots at ``place``, and those that merge, are written at a block's end.

    Returns:
      It, the places and the merge, to be used in their stead: writes then wait for reads, without
      which XLA would copy the bank.
    """
    rings, batch = rings_of(cache), len(block)
    of_states, of_keys = cache.storages

    def save(past: Past, place: Array, merge: Any) -> tuple[Past, Array, Any]:
        places = [place]
        if _merges(cache.config):
            nowhere = jnp.full(batch, of_keys.num_slots)
            places.append((nowhere if merge is None else merge.into)[:, None])
        slots = jnp.concatenate(places, axis=1).astype(jnp.int32)
        each = jnp.broadcast_to(slots[:, None], (batch, len(of_keys.state), slots.shape[1]))
        held = of_states.take(cache.bank, each), of_keys.take(cache.pooled, each)
        put = [
            ring.put(
                arrays, jax.tree.map(lambda x: x[:, None], rows), block[:, None], ended[:, None]
            )
            for ring, arrays, rows in zip(rings[2:], past[2:], (slots, *held), strict=True)
        ]
        return Past(*past[:2], *put), place, merge

    return lax.cond(
        ended.any(), save, lambda *same: same, *(cache.past, place.astype(jnp.int32), merge)
    )


def rewound(cache: Any, tokens: Int[Array, "b"]) -> Any:
    """A cache without the last tokens of each row."""
    rings, past, config = rings_of(cache), cache.past, cache.config
    position, rewindable = taken_back(cache.position, cache.rewindable, tokens)
    moved = (tokens > 0) & (position < cache.position)
    state, anchor, transition, key_sum = where_rows(
        moved, rings.live.at(past.live, position), _live(cache)
    )
    changes: dict[str, Any] = dict(
        position=position,
        rewindable=rewindable,
        state=state,
        anchor=anchor,
        transition=transition,
        key_sum=key_sum,
        record=where_rows(moved, rings.record.at(past.record, position), cache.record),
    )
    if rings.slots is not None:
        segment, none = config.segmentation.size, config.slots.num_slots

        def undo(ago: Array, kept: tuple) -> tuple:
            """Puts back what the end of a block replaced, the last one first."""
            block = cache.position // segment - 1 - ago
            undone = moved & (block >= position // segment)
            slots = jnp.where(undone[:, None], rings.slots.at(past.slots, block), none)
            held = rings.bank.at(past.bank, block), rings.pooled.at(past.pooled, block)
            return tuple(
                storage.put(arrays, rows, slots)
                for storage, arrays, rows in zip(cache.storages, kept, held, strict=True)
            )

        bank, pooled = lax.fori_loop(0, rings.slots.size, undo, (cache.bank, cache.pooled))
        changes |= dict(bank=bank, pooled=pooled)
    return dataclasses.replace(cache, **changes)


def _live(cache: Any) -> tuple:
    return cache.state, cache.anchor, cache.transition, cache.key_sum


def _merges(config: Any) -> bool:
    """Whether a segment's end may merge two states too."""
    eviction = config.eviction
    return eviction is not None and not eviction.drops
