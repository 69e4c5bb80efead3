"""Writing a sequence into memories, block by block: live states, and the states of buckets."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memcache_jax._typing import Array, State
from memcache_jax.kernels.chunk_update import chunk_update
from memcache_jax.memories import Memory
from memcache_jax.segmentation import ReadPlan


def initial_states(
    memory: Memory,
    weights: Mapping[str, Array],
    shape: tuple[int, ...],
    key_dim: int,
    value_dim: int,
    dtype: Any,
) -> State:
    """The states before the first token, arrays (*shape, ...) with shape (b, h, ...)."""
    init = functools.partial(memory.init, key_dim=key_dim, value_dim=value_dim, dtype=dtype)
    states = jax.vmap(init, axis_size=shape[1])(weights)

    def repeat(x: Array) -> Array:
        x = x.reshape(1, shape[1], *[1] * (len(shape) - 2), *x.shape[1:])
        return jnp.broadcast_to(x, (*shape, *x.shape[len(shape) :]))

    return jax.tree.map(repeat, states)


def write_blocks(
    memory: Memory,
    live: Callable[[Any, Array], Any],
    initial: Callable[[tuple[int, ...]], State],
    rows: tuple,
    plan: ReadPlan,
    *,
    carries: bool,
) -> tuple[State, Any]:
    """Writes blocks (b, h, n, chunks, m, ...) into the live memory.

    Args:
      memory: the rule.
      live: what to keep of a chunk, from its view and its queries.
      initial: makes initial states of a shape (b, h, ...).
      rows: queries, keys, values, controls, and None or how many documents have begun in the
        chunk up to each token.
      plan: where segments begin.
      carries: whether segments go on from the one before, rather than anew.

    Returns:
      The states at the end of each block (b, h, n, ...), and what was kept of its chunks.
    """
    write, start = _writer(memory, live, initial, rows)
    batch, heads, blocks = rows[1].shape[:3]
    restarts = (plan.first == np.arange(blocks)) & (not carries)
    if restarts.all():
        # Every block begins anew, and all run side by side.
        (ends, _), kept = chunk_update(write, start((batch, heads, blocks)), rows, batch_dims=3)
        return ends, kept

    first = start((batch, heads))

    def block(states: State, xs: tuple) -> tuple[State, tuple[State, Any]]:
        restart, rows = xs
        states = jax.tree.map(lambda new, old: jnp.where(restart, new, old), first, states)
        states, kept = chunk_update(write, states, rows, batch_dims=2)
        return states, (states[0], kept)

    rows = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), rows)
    _, out = lax.scan(block, first, (jnp.asarray(restarts), rows))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), out)


def _writer(
    memory: Memory,
    live: Callable[[Any, Array], Any],
    initial: Callable[[tuple[int, ...]], State],
    rows: tuple,
) -> tuple[Callable, Callable]:
    """How a chunk is written, and what it starts from: a state, and where documents begin theirs.

    The latter is None where there is no need for it.
    """

    def write(states: tuple, rows: tuple) -> tuple[tuple, Any]:
        (state, fresh), (query, key, value, controls, document) = states, rows
        if document is None:
            end, view = memory.write(state, state, key, value, controls)
        else:
            # It came as a float, for a program's cotangents.
            begun = document.astype(jnp.int32)
            end, view = memory.write_documents(state, fresh, key, value, controls, begun)
        return (end, fresh), live(view, query)

    own = type(memory).write_documents is not Memory.write_documents
    takes_initial = own and rows[4] is not None

    def start(shape: tuple[int, ...]) -> tuple:
        states = initial(shape)
        return states, states if takes_initial else None

    return write, start


def bucket_states(
    memory: Memory,
    ends: State,
    initial: Callable[[tuple[int, ...]], State],
    rows: tuple,
    plan: ReadPlan,
    *,
    carries: bool,
) -> State:
    """The cached states (b, h, buckets, ...), from those at the ends of blocks where they serve.

    A bucket of several segments that begin anew is one run over it from the initial state: merged
    from smaller ones where the memory can, else written once more.

    Args:
      memory: the rule.
      ends: states at the end of each block, as from ``write_blocks``.
      initial: as for ``write_blocks``.
      rows: as for ``write_blocks``.
      plan: the buckets.
      carries: as for ``write_blocks``.
    """
    sizes = plan.buckets[:, 1] - plan.buckets[:, 0]
    if carries or plan.runs_are_live.all():
        return jax.tree.map(lambda x: x[:, :, plan.buckets[:, 1] - 1], ends)
    parts, places = [], []
    states = ends
    for size in range(1, int(sizes.max()) + 1):
        (chosen,) = np.nonzero(sizes == size)
        if memory.mergeable and size > 1 and size & (size - 1) == 0:
            states = _merge_pairs(memory, states, rows[3], size)
        if not len(chosen):
            continue
        begin = plan.buckets[chosen, 0]
        if size == 1:
            part = jax.tree.map(lambda x, begin=begin: x[:, :, begin], ends)
        elif memory.mergeable:
            index = begin // size
            part = jax.tree.map(lambda x, index=index: x[:, :, index], states)
        else:
            part = _write_runs(memory, initial, rows, begin, size)
        parts.append(part)
        places.append(chosen)
    order = np.argsort(np.concatenate(places))
    return jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=2)[:, :, order], *parts)


def _merge_pairs(memory: Memory, states: State, controls: Any, size: int) -> State:
    """States of aligned runs of ``size`` blocks, from those of half the size."""
    pairs = jax.tree.leaves(states)[0].shape[2] // 2
    left, right = (
        jax.tree.map(lambda x, side=side: x[:, :, side : 2 * pairs : 2], states) for side in (0, 1)
    )

    def later_half(x: Array) -> Array:
        x = x[:, :, : pairs * size].reshape(*x.shape[:2], pairs, 2, -1, *x.shape[5:])
        return x[:, :, :, 1]

    merge = memory.merge
    for _ in range(3):
        merge = jax.vmap(merge)
    return merge(left, right, jax.tree.map(later_half, controls))


def _write_runs(
    memory: Memory,
    initial: Callable[[tuple[int, ...]], State],
    rows: tuple,
    begin: np.ndarray,
    size: int,
) -> State:
    """The states after runs of ``size`` blocks that begin anew at the blocks ``begin``."""
    blocks = begin[:, None] + np.arange(size)[None]

    def runs(x: Array) -> Array:
        x = x[:, :, blocks.reshape(-1)]
        return x.reshape(*x.shape[:2], len(begin), -1, *x.shape[4:])

    write, start = _writer(memory, lambda view, query: (), initial, rows)
    states = start((*rows[1].shape[:2], len(begin)))
    (ends, _), _ = chunk_update(write, states, jax.tree.map(runs, rows), batch_dims=3)
    return ends
