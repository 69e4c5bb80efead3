"""Writing a sequence into memories, block by block."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memcache_jax._typing import Array, Bool, Controls, Matrices, State
from memcache_jax._varying import vary, varying
from memcache_jax.engine.affine import write_affine
from memcache_jax.engine.descent import option_reasons, write_descent
from memcache_jax.engine.finite import as_they_came, spoil, spoilt_in_chunk, with_finite_writes
from memcache_jax.engine.read import keep
from memcache_jax.engine.types import Carry, Rows, Views, Writing
from memcache_jax.kernels._dispatch import check_served
from memcache_jax.kernels.chunk_update import Edges, chunk_update
from memcache_jax.memories import DeepMemory, Memory
from memcache_jax.memories.affine import MAP_PRECISION
from memcache_jax.memories.base import Run, first_of_documents
from memcache_jax.memories.deep_chunk import DeepState

SMALL_STATE, SMALL_CHUNK = 32 * 32, 32


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


def write_blocks(how: Writing, rows: Rows, restarts: Bool[np.ndarray, "n"]) -> tuple[Run, Views]:
    """Writes blocks (b, h, n, chunks, m, ...) into the live memory.

    Args:
      how: the rule, and what to keep.
      rows: the blocks.
      restarts: whether each block begins from the initial state, rather than from the end of the
        block before; the first one always does. If all do, they run side by side.

    Returns:
      The runs up to the end of each block (b, h, n, ...), and what was kept of its chunks.
    """
    deep = how.memory.form == "descent" and how.implementation == "pallas_tpu"
    if deep and rows.came is not None:
        return write_as_they_came(how, rows, restarts)
    run, kept = _write_finite(how, rows, restarts)
    state, kept = spoil(how.memory, rows, restarts, run.state, kept)
    return run._replace(state=state), kept


def _write_finite(how: Writing, rows: Rows, restarts: Bool[np.ndarray, "n"]) -> tuple[Run, Views]:
    """``write_blocks`` of rows that are all finite."""
    memory, implementation = how.memory, how.implementation
    if memory.form == "affine" and set(how.needs) <= {"reads"} and _gains(how, rows, restarts):
        return write_at_once(how, rows, restarts)
    rows = rows._replace(bad=None, came=None)
    if memory.form == "descent" and implementation == "pallas_gpu":
        ends, kept = write_descent(how, *chunk_writer(how, rows), rows, restarts)
        return Run(ends, None), kept
    return write_in_turn(how, rows, restarts)


def _gains(how: Writing, rows: Rows, restarts: Bool[np.ndarray, "n"]) -> bool:
    """Whether an affine memory is written faster by ``write_at_once`` than ``write_in_turn``.

    Kernels are made for it. With XLA, by measurements on CPUs (``experiments.growth --starts``):

    - Blocks that all begin anew: where chunks add to the memory without reading it.
    - Blocks that go on from each other, of a memory that erases: where states and chunks are small,
      at most ``SMALL_STATE`` numbers and ``SMALL_CHUNK`` tokens. There a step costs more than what
      it computes, and of what waits for the chunk before two products are left. Larger ones lose,
      and all maps would be in memory at once. Accelerators have the same rule: not measured, but a
      step that waits costs them more than a CPU, so where CPUs gain they are assumed to.
    """
    memory = how.memory
    if how.implementation is not None and how.implementation != "xla":
        return how.implementation != "reference"
    if restarts.all():
        return not memory.erases
    chunk, state = rows.key.shape[4], rows.key.shape[-1] * rows.value.shape[-1]
    small = chunk <= SMALL_CHUNK and state <= SMALL_STATE
    return small and memory.erases and not how.maps


def write_at_once(how: Writing, rows: Rows, restarts: Bool[np.ndarray, "n"]) -> tuple[Run, Views]:
    """``write_blocks`` of finite rows: maps of all chunks side by side, then applied in turn."""
    ends, kept = write_affine(how, rows, restarts)
    finite = rows._replace(bad=None, came=None)
    return Run(ends, transitions(how, finite, restarts) if how.maps else None), kept


def write_in_turn(how: Writing, rows: Rows, restarts: Bool[np.ndarray, "n"]) -> tuple[Run, Views]:
    """``write_blocks`` of finite rows, one chunk after the other."""
    carry, kept = _carried(*chunk_writer(how, rows), rows, restarts, how.implementation)
    return Run(carry.state, carry.transition), kept


def write_as_they_came(
    how: Writing, rows: Rows, restarts: Bool[np.ndarray, "n"]
) -> tuple[Run, Views]:
    """``write_blocks`` by kernels that read ``rows.came`` in its dtype.

    They also clean it; a spoilt state is NaN between chunks. Where all blocks begin anew, states
    come without momentum, which nothing reads.
    """
    assert isinstance(how.memory, DeepMemory)
    check_served("chunk_update", "pallas_tpu", option_reasons(how.memory))
    came = as_they_came(rows)._replace(begun=rows.begun)
    narrow, wide = jnp.result_type(came.query, came.key, came.value), rows.key.dtype
    write, start = chunk_writer(how, rows)

    def clean_write(carry: Carry, came: Rows) -> tuple[Carry, Views]:
        some = carry.state.weights[0][0, 0]
        before = jnp.where(jnp.isnan(some), jnp.ones_like(some), 0)
        lost = spoilt_in_chunk(came, before)
        state = jax.tree.map(lambda x: jnp.where(before > 0, 0, x), carry.state)
        finite = jax.tree.map(lambda x: x.astype(wide), with_finite_writes(came))
        carry, kept = write(carry._replace(state=state), finite)
        state = jax.tree.map(lambda x: jnp.where(lost[-1] > 0, jnp.nan, x), carry.state)
        if "reads" in kept:
            kept["reads"] = jnp.where(lost[:, None] > 0, jnp.nan, kept["reads"]).astype(narrow)
        if kept.keys() - {"reads"}:
            kept["spoilt"] = lost
        return carry._replace(state=state), kept

    if not restarts.all():
        carry, kept = _carried(clean_write, start, came, restarts, how.implementation)
        return Run(carry.state, None), kept
    first = start((*rows.key.shape[:2], 1))

    def begin(weights: Matrices) -> Carry:
        momentum = jax.tree.map(jnp.zeros_like, weights) if first.state.momentum else ()
        state = DeepState(weights, momentum)
        return Carry(state, None if first.initial is None else state)

    weights, kept = chunk_update(
        *(clean_write, first.state.weights, came),
        batch_dims=3,
        implementation=how.implementation,
        late=_late(came),
        edges=Edges(begin, lambda carry: carry.state.weights),
    )
    return Run(DeepState(weights), None), kept


def transitions(how: Writing, rows: Rows, restarts: Bool[np.ndarray, "n"]) -> Any:
    """The transitions alone, as ``write_blocks`` returns them."""

    def extend(transition: Any, rows: Rows) -> tuple[Any, None]:
        return extended(how.memory, transition, rows), None

    start = functools.partial(_identity, how.memory, rows)
    return _carried(extend, start, rows, restarts, None)[0]


def _carried(
    write: Callable[[Any, Rows], tuple[Any, Any]],
    start: Callable[[tuple[int, ...]], Any],
    rows: Rows,
    restarts: Bool[np.ndarray, "n"],
    implementation: str | None,
) -> tuple[Any, Any]:
    """What blocks hand on, (b, h, n, ...), and what was kept of their chunks."""
    update = functools.partial(chunk_update, write, implementation=implementation, late=_late(rows))
    batch, heads, blocks = rows.key.shape[:3]
    if restarts.all():
        return update(start((batch, heads, blocks)), rows, batch_dims=3)
    first = start((batch, heads))

    def block(carry: Any, xs: tuple) -> tuple[Any, tuple]:
        restart, rows = xs
        carry = jax.tree.map(lambda new, old: jnp.where(restart, new, old), first, carry)
        carry, kept = update(carry, rows, batch_dims=2)
        return carry, (carry, kept)

    rows = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), rows)
    _, out = lax.scan(block, first, (jnp.asarray(restarts), rows))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), out)


def _late(rows: Rows) -> Rows:
    """The rows that no later state depends on, for ``chunk_update``."""
    return jax.tree.map(lambda x: False, rows)._replace(query=True)


def _identity(memory: Memory, rows: Rows, shape: tuple[int, ...]) -> Any:
    """The transitions of no tokens, arrays (*shape, ...)."""
    identity = memory.identity(rows.key.shape[-1], rows.key.dtype)
    identities = jax.tree.map(
        lambda x: jnp.broadcast_to(x.reshape(*[1] * len(shape), *x.shape), (*shape, *x.shape)),
        identity,
    )
    return vary(identities, varying(rows.key))


def extended(memory: Memory, transition: Any, rows: Rows) -> Any:
    """The transition of a run and the chunk (m, ...) after it."""
    controls = _forgetting(memory, rows)
    with jax.default_matmul_precision(MAP_PRECISION):
        return memory.extended(transition, rows.key, rows.value, controls)


def _forgetting(memory: Memory, rows: Rows) -> Controls:
    """The controls of a chunk (m, ...), with which the first tokens of documents forget."""
    if rows.begun is None:
        return rows.controls
    sizes = rows.key.shape[-1], rows.value.shape[-1]
    if type(memory).write_documents is not Memory.write_documents or memory.weight_shapes(*sizes):
        raise ValueError(
            f"{type(memory).__name__} begins documents its own way, which runs that compose do not "
            "follow: give it forgetting() and states that begin at zero, or state merges = False"
        )
    return memory.forgetting(rows.controls, first_of_documents(rows.begun.astype(jnp.int32)))


def write_runs(how: Writing, rows: Rows) -> State:
    """The states after blocks that all begin anew."""
    return write_blocks(how.with_no_reads(), rows, np.ones(rows.key.shape[2], bool))[0].state


def chunk_writer(how: Writing, rows: Rows) -> tuple[Callable, Callable]:
    """How chunks are written one after the other, and what they start from.

    Returns:
      ``write(carry, rows)``, which returns the next carry and what is kept of the chunk; and
      ``start(shape)``, which makes the first carry, of a shape (b, h, ...).
    """
    sizes = rows.key.shape[-1], rows.value.shape[-1]
    # Documents begin with the weights that each head has learned, or else with constants.
    learned = rows.begun is not None and bool(how.memory.weight_shapes(*sizes))

    def write(carry: Carry, rows: Rows) -> tuple[Carry, Views]:
        if how.maps:
            run = Run(carry.state, carry.transition)
            controls = _forgetting(how.memory, rows)
            with jax.default_matmul_precision(MAP_PRECISION):
                run, view = how.memory.write_map(run, rows.key, rows.value, controls)
            kept = keep(how.memory, how.needs, view, rows.query)
            return Carry(run.state, carry.initial, run.transition), kept
        end, kept = write_chunk(how, carry.state, carry.state, rows, carry.initial)
        return Carry(end, carry.initial), kept

    def start(shape: tuple[int, ...]) -> Carry:
        states = how.initial(shape)
        transition = _identity(how.memory, rows, shape) if how.maps else None
        return Carry(states, states if learned else None, transition)

    return write, start


def write_chunk(
    how: Writing, state: State, anchor: State, rows: Rows, initial: State = None
) -> tuple[State, Views]:
    """Writes a chunk (m, ...) of one memory; returns its state afterwards and the views to keep.

    Args:
      how: the rule, and what to keep.
      state: the state before the chunk's first token.
      anchor: the state with which the chunk began; the tokens may be only its later part.
      rows: the tokens.
      initial: what documents begin with, of a memory with learned weights.
    """
    memory = how.memory
    if rows.begun is None:
        end, view = memory.write(state, anchor, rows.key, rows.value, rows.controls)
    else:
        if initial is None:
            sizes = rows.key.shape[-1], rows.value.shape[-1]
            initial = memory.init({}, *sizes, rows.key.dtype)
        begun = rows.begun.astype(jnp.int32)
        end, view = memory.write_documents(
            state, initial, rows.key, rows.value, rows.controls, begun
        )
    return end, keep(memory, how.needs, view, rows.query)
