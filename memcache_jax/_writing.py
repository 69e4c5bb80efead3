"""Writing a sequence into memories, block by block."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memcache_jax._affine import write_affine
from memcache_jax._deep import write_deep
from memcache_jax._typing import Array, Bool, State
from memcache_jax.kernels._dispatch import CannotServeError
from memcache_jax.kernels.chunk_update import chunk_update
from memcache_jax.memories import Memory
from memcache_jax.memories.deep import DeepMemory
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
    implementation: str | None,
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
      implementation: of ``chunk_update``, or of the update for memories of this kind.

    Returns:
      The states at the end of each block (b, h, n, ...), and what was kept of its chunks.
    """
    restarts = plan.begins & (not carries)
    if restarts.all():
        return write_runs(memory, live, initial, rows, implementation)
    out = _written_at_once(memory, live, initial, rows, restarts, implementation)
    if out is not None:
        return out

    write, start = chunk_writer(memory, live, initial, rows)
    batch, heads = rows[1].shape[:2]
    first = start((batch, heads))

    def block(states: State, xs: tuple) -> tuple[State, tuple[State, Any]]:
        restart, rows = xs
        states = jax.tree.map(lambda new, old: jnp.where(restart, new, old), first, states)
        states, kept = chunk_update(
            write, states, rows, batch_dims=2, implementation=implementation
        )
        return states, (states[0], kept)

    rows = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), rows)
    _, out = lax.scan(block, first, (jnp.asarray(restarts), rows))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), out)


def write_runs(
    memory: Memory,
    live: Callable[[Any, Array], Any],
    initial: Callable[[tuple[int, ...]], State],
    rows: tuple,
    implementation: str | None,
) -> tuple[State, Any]:
    """``write_blocks`` where each block begins anew, and all run side by side."""
    runs = rows[1].shape[:3]
    restarts = np.ones(runs[2], bool)
    out = _written_at_once(memory, live, initial, rows, restarts, implementation)
    if out is not None:
        return out
    write, start = chunk_writer(memory, live, initial, rows)
    (ends, _), kept = chunk_update(
        write, start(runs), rows, batch_dims=3, implementation=implementation
    )
    return ends, kept


def _written_at_once(
    memory: Memory,
    live: Callable[[Any, Array], Any],
    initial: Callable[[tuple[int, ...]], State],
    rows: tuple,
    restarts: Bool[np.ndarray, "n"],
    implementation: str | None,
) -> tuple[State, Any] | None:
    """``write_blocks`` in the form for memories of this kind, which has all their chunks at once.

    None if the implementation has no such form.
    """
    if memory.is_affine:
        write_all = functools.partial(write_affine, memory, live, initial, rows, restarts)
        if implementation in ("pallas_tpu", "pallas_gpu"):
            return write_all(implementation)
        # XLA gains where chunks add to the memory without reading it; measured on CPUs.
        if implementation in (None, "xla") and memory.mergeable and restarts.all():
            try:
                return write_all(implementation)
            except CannotServeError:  # an aggregation that wants more of the live memory
                return None
    if isinstance(memory, DeepMemory) and implementation == "pallas_gpu":
        write, start = chunk_writer(memory, live, initial, rows)
        return write_deep(memory, write, start, rows, restarts, implementation)
    return None


def chunk_writer(
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
