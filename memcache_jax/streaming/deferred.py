"""Deep memories in a stream: tokens as factors, and states once their chunk is complete."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Bool, Int, State
from memcache_jax.engine.finite import spoil
from memcache_jax.engine.read import keep
from memcache_jax.engine.types import Rows, Views, Writing
from memcache_jax.memories import Memory
from memcache_jax.memories.pending import Pending, no_tokens, settled, with_tokens
from memcache_jax.streaming.in_place import change_rows


def emptied(memory: Memory, initial: State, pending: Pending, rows: Bool[Array, "b"]) -> Pending:
    """Resets the marked rows to before a chunk's first token; factors may keep old values."""
    first = jax.tree.map(lambda x: x[0], initial)
    deep: Any = memory
    empty = no_tokens(deep, first)
    shares = jax.tree.map(
        lambda new, old: jnp.where(rows.reshape(-1, *[1] * (old.ndim - 1)), new, old),
        (empty.weights, empty.momentum),
        (pending.weights, pending.momentum),
    )
    return pending._replace(weights=shares[0], momentum=shares[1])


def pending_with(
    how: Writing, cache: Any, rows: Rows, counts: Int[Array, "b"]
) -> tuple[Pending, Views, Any]:
    """Adds the first ``counts`` tokens (b, h, 1, 1, n, ...).

    A non-finite token makes the shares NaN, and with them later tokens' reads and the state.

    Returns:
      The pending tokens, the live track's views, and the shares (b, h, tracks, n, ...) after each
      token, unused past ``counts``.
    """
    deep: Any = how.memory
    place = cache.position % deep.chunk_size  # an inactive row's next token overwrites it
    tokens = jax.tree.map(lambda x: x[:, :, 0, 0], rows._replace(bad=None))

    def of_track(
        how: Writing, state: State, pending: Pending, place: Array, count: Array, row: Rows
    ) -> tuple:
        added = with_tokens(deep, state, pending, place, count, row.key, row.value, row.controls)
        return (added[0], added[2]), keep(deep, how.needs, added[1], row.query)

    # The live track alone, without its axis: with an axis of size one XLA may choose another layout
    # for the states and copy them.
    live: Any = jax.vmap(jax.vmap(functools.partial(of_track, how), (0, 0, None, None, 0)))
    own = jax.tree.map(lambda x: x[:, :, 0], (cache.state, cache.pending))
    added, kept = live(*own, place, counts, tokens)
    added = jax.tree.map(lambda x: x[:, :, None], added)
    kept = jax.tree.map(lambda x: x[:, :, None, None], kept)
    if cache.key_sum.shape[2] > 1 and jax.tree.leaves(cache.state)[0].shape[2] > 1:
        one = functools.partial(of_track, how.with_no_reads())
        tracks: Any = jax.vmap(one, (0, 0, None, None, None))
        tracks = jax.vmap(jax.vmap(tracks, (0, 0, None, None, 0)))
        later = jax.tree.map(lambda x: x[:, :, 1:], (cache.state, cache.pending))
        others, _ = tracks(*later, place, counts, tokens)
        added = jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=2), added, others)
    pending, each = added
    shares = pending.weights, pending.momentum
    shares, kept = spoil(how.memory, rows, np.array([True]), shares, kept)
    old, active = (cache.pending.weights, cache.pending.momentum), counts > 0
    shares = jax.tree.map(
        lambda new, old: jnp.where(active.reshape(-1, *[1] * (new.ndim - 1)), new, old), shares, old
    )
    pending = pending._replace(weights=shares[0], momentum=shares[1])
    assert rows.bad is not None
    lost = jnp.cumsum(rows.bad[:, :, 0, 0], axis=2)[:, :, None] > 0
    each = jax.tree.map(
        lambda x: jnp.where(lost.reshape(*lost.shape, *[1] * (x.ndim - 4)), jnp.nan, x), each
    )
    return pending, kept, each


def settle(memory: Memory, state: State, pending: Pending, complete: Bool[Array, "b"]) -> State:
    """Writes the pending tokens into the states of rows whose chunk is complete."""
    of_row = functools.partial(_settled_row, memory)
    new = change_rows(of_row, complete, _side_by_side(state), (_side_by_side(pending),))
    return jax.tree.map(lambda x, like: x.reshape(like.shape), new, state)


def reset(state: State, restart: Bool[Array, "b tracks"], initial: State) -> State:
    """Resets the states of the marked tracks to the initial ones, (h, ...)."""
    heads, tracks = jax.tree.leaves(state)[0].shape[1:3]
    again = jnp.tile(restart, (1, heads))
    # Transposed as the weights are, so that XLA need not copy them for a loop of no iterations.
    start = jax.tree.map(lambda x: jnp.repeat(x, tracks, axis=0).mT, initial)
    new = change_rows(_reset_row, restart.any(axis=1), _side_by_side(state), (again,), (start,))
    return jax.tree.map(lambda x, like: x.reshape(like.shape), new, state)


def _side_by_side(tree: Any) -> Any:
    """Merges heads and tracks: with two axes, XLA may choose another layout and copy the arrays."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), tree)


def _settled_row(memory: Any, state: State, pending: Pending) -> State:
    return jax.vmap(functools.partial(settled, memory))(state, pending)


def _reset_row(state: State, again: Bool[Array, "runs"], start: State) -> State:
    return jax.tree.map(lambda new, old: jnp.where(again[:, None, None], new.mT, old), start, state)
