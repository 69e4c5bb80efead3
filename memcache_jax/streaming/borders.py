"""Going back to where a segment begins, from the states that a cache keeps of earlier ones."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Bool, Int
from memcache_jax.streaming.exact import matrices_of
from memcache_jax.streaming.ring import where_rows
from memcache_jax.streaming.slots import Decided, Planned


def borders_of(cache: Any, length: int) -> np.ndarray:
    """The positions up to ``length`` at which a segment of a ``streaming.Cache`` begins.

    Raises:
      ValueError: if the cache does not keep what a stream needs there.
    """
    config, slots = cache.config, cache.config.slots
    why = None
    if isinstance(slots, Decided):
        why = f"{config.segmentation} decides borders as it goes, and keeps no list of them"
    elif slots.num_tracks > 1:
        why = (
            f"{config.segmentation} writes buckets over several segments, and keeps only their ends"
        )
    elif config.eviction is not None and config.eviction.counts_reads:
        why = f"policy={config.policy!r} adds up the gates of all tokens, and keeps no earlier sums"
    elif config.start == "checkpoint" and config.eviction is not None and not config.eviction.drops:
        why = "segments with start='checkpoint' go on from whole states, and the cache merges them"
    elif config.start == "checkpoint":
        whole = jax.eval_shape(_whole_state, cache)
        if whole is None or config.cache_dtype != jnp.dtype(cache.key_sum.dtype).name:
            why = (
                f"segments with start='checkpoint' go on from whole states, and the cache keeps "
                f"those of {type(config.memory).__name__} without momentum, in {config.cache_dtype}"
            )
    if why is not None:
        raise ValueError(f"cannot return to a segment's begin: {why}; a PrefixStore keeps caches")
    size = config.segmentation.size
    if isinstance(slots, Planned):
        begins = np.flatnonzero(slots.schedule.begins[:, 0]) * size
        return begins[begins <= length]
    return np.arange(0, length + 1, size)


def check_keeps_ends(config: Any) -> None:
    """Raises ValueError for a cache whose segments end where the content says."""
    if isinstance(config.slots, Decided):
        raise ValueError(
            f"keep_ends needs segments with known ends, which {config.segmentation} does not have; "
            "a PrefixStore keeps caches"
        )


def num_ends(config: Any) -> int:
    """How many segments' ends to keep inputs of: none that rows can return to is overwritten.

    They are those of all cached states, the one after them, and those that ``rewind`` takes back.
    """
    slots = config.slots
    if isinstance(slots, Planned):
        return len(slots.schedule.begins)
    return slots.num_slots + 1 - (-config.rewind // config.segmentation.size)


def returned(
    cache: Any, position: Int[Array, "b"], rows: Bool[Array, "b"]
) -> tuple[Any, Bool[Array, "b"]]:
    """As ``MixerCache.returned``, of a ``streaming.Cache``."""
    config, slots = cache.config, cache.config.slots
    now, then = (x // config.segmentation.size for x in (cache.position, position))
    record, gone, place, whole = slots.returned(cache.record, now, then)
    changes: dict[str, Any] = dict(
        position=jnp.where(rows, position, cache.position),
        record=where_rows(rows, record, cache.record),
    )
    if cache.rewindable is not None:
        changes["rewindable"] = jnp.where(rows, 0, cache.rewindable)
    if config.start == "checkpoint" and slots.num_slots:
        state = jax.tree.map(
            lambda kept, new: jnp.where((then > 0).reshape(-1, *[1] * (kept.ndim - 1)), kept, new),
            _whole_state(cache, place),
            jax.tree.map(lambda x: x[None, :, None], cache.initial),
        )
        changes["state"] = where_rows(rows, state, cache.state)
    if slots.num_slots:
        # Empty as before: 0 * NaN is NaN in a read.
        empty = jnp.where(gone & rows[:, None], np.arange(slots.num_slots)[None], slots.num_slots)
        names = ["pooled"] if config.placement == "host" else ["bank", "pooled"]
        for name, storage in zip(names[::-1], cache.storages[::-1], strict=False):
            shape = len(position), slots.num_slots
            zeros = jax.tree.map(
                lambda x, shape=shape: jnp.zeros(
                    (shape[0], len(x), shape[1], *x.shape[1:]), x.dtype
                ),
                storage.state,
            )
            changes[name] = storage.put(getattr(cache, name), zeros, empty)
    return dataclasses.replace(cache, **changes), whole | ~rows


def _whole_state(cache: Any, place: Int[Array, "b"] | None = None) -> Any:
    """The states (b, h, 1, ...) in these slots; None if they are more than what is read of them."""
    leaves, structure = jax.tree.flatten(cache.initial)
    matrices = cache.config.memory.matrices(cache.initial)
    if [x.size for x in leaves] != [x.size for x in matrices]:
        return None
    if place is None:
        return cache.initial
    heads = cache.sizes[0]
    slots = jnp.broadcast_to(place[:, None, None], (len(place), heads, 1))
    kept = cache.storages[0].take(matrices_of(cache), slots)
    shaped = [
        x.reshape(len(place), heads, 1, *y.shape[1:]) for x, y in zip(kept, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, shaped)
