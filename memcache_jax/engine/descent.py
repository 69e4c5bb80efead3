"""Writing blocks of a deep memory by the kernel that carries it through all of their chunks."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Bool, State
from memcache_jax.engine.types import Carry, Rows, Views, Writing
from memcache_jax.kernels._dispatch import check_served, written
from memcache_jax.kernels._shapes import power_of_two
from memcache_jax.kernels.deep_update import deep_update
from memcache_jax.memories import DeepMemory
from memcache_jax.memories.deep_chunk import DeepState


def write_descent(
    how: Writing,
    write: Callable[[Carry, Rows], tuple[Carry, Views]],
    start: Callable[[tuple[int, ...]], Carry],
    rows: Rows,
    restarts: Bool[np.ndarray, "n"],
) -> tuple[State, Views]:
    """``write_blocks`` whose recurrence makes only the states that chunks start from.

    From these states all chunks are written and read side by side, and the backward pass repeats
    it. All chunks' states are held at once, in the forward pass too.

    Args:
      how: the rule, of the form ``"descent"``.
      write: as from ``chunk_writer``.
      start: as from ``chunk_writer``.
      rows: the blocks.
      restarts: as for ``write_blocks``. If all blocks begin anew, they run side by side.
    """
    memory, implementation = how.memory, how.implementation
    assert isinstance(memory, DeepMemory)
    assert implementation is not None
    check_served("deep_update", implementation, _reasons(memory, rows))
    batch, chunks = rows.key.shape[:3], rows.key.shape[3]
    lead = batch if restarts.all() else batch[:2]
    units, count = math.prod(lead), math.prod(batch[len(lead) :]) * chunks
    begins = np.outer(restarts, np.arange(chunks) == 0).reshape(-1)[:count]
    begins[0] = True

    def run(first: Carry, rows: Rows) -> tuple[State, Views]:
        states, goes_on = first.state, jnp.broadcast_to(~begins, (units, count))
        given = jax.tree.map(
            lambda x: jnp.broadcast_to(x[:, None], (units, count, *x.shape[1:])), states
        )
        write_each = jax.vmap(jax.vmap(write, in_axes=(Carry(0, None), 0)))
        if rows.begun is not None:
            # The end of a chunk in which a document begins depends on no earlier state.
            after, _ = write_each(Carry(given, first.initial), rows)
            given = jax.tree.map(lambda x, end: _where(begins, x, _after(end)), given, after.state)
            goes_on &= ~_after(rows.begun[..., -1] > 0)
        starts = DeepState(
            *deep_update(
                jax.vmap(jax.vmap(memory.descent))(rows.key, rows.value, rows.controls),
                tuple(part for part in given if part),
                goes_on.astype(rows.key.dtype),
                loss=memory.loss,
                implementation=implementation,
            )
        )
        _, kept = write_each(Carry(starts, first.initial), rows)
        starts, rows = jax.tree.map(lambda x: x[:, chunks - 1 :: chunks], (starts, rows))
        after, _ = write_each(Carry(starts, first.initial), rows)
        return after.state, kept

    @jax.custom_vjp
    def update(first: Carry, rows: Rows) -> tuple[State, Views]:
        return run(first, rows)

    def forward(first: Carry, rows: Rows) -> tuple[tuple[State, Views], tuple]:
        return written(run(first, rows)), (first, rows)

    def backward(residuals: tuple, cotangents: tuple[State, Views]) -> tuple:
        return jax.vjp(run, *residuals)[1](cotangents)

    update.defvjp(forward, backward)
    first = jax.tree.map(lambda x: x.reshape(units, *x.shape[len(lead) :]), start(lead))
    ends, kept = update(first, jax.tree.map(lambda x: x.reshape(units, count, *x.shape[4:]), rows))
    ends = jax.tree.map(lambda x: x.reshape(*batch, *x.shape[2:]), ends)
    return ends, jax.tree.map(lambda x: x.reshape(*batch, chunks, *x.shape[2:]), kept)


def _reasons(memory: DeepMemory, rows: Rows) -> list[tuple[bool, str]]:
    """Why kernels cannot serve a memory, for ``check_served``."""
    sizes = (*rows.key.shape[-2:], rows.value.shape[-1])
    filled = any(size != power_of_two(size) for size in sizes)
    return [
        (
            memory.max_step_norm is not None,
            f"the steps of {type(memory).__name__} have a bound: max_step_norm must be None, and a "
            "layer's bounded False",
        ),
        *option_reasons(memory),
        (
            filled and not memory.zeros_add_nothing,
            f"the loss of {type(memory).__name__} is taken of chunks that are not filled up: rows, "
            f"key and value dimension, {sizes}, must be powers of two from 16 on",
        ),
    ]


def option_reasons(memory: DeepMemory) -> list[tuple[bool, str]]:
    """Those of ``_reasons`` that apply to all kernels."""
    name = type(memory).__name__
    return [
        (memory.ns_steps > 0, f"{name} has ns_steps={memory.ns_steps}, must be 0"),
        (memory.degree > 1, f"{name} has degree={memory.degree}, must be 1"),
    ]


def _after(x: Array) -> Array:
    """The value of the chunk before each one, (units, chunks, ...)."""
    return jnp.roll(x, 1, axis=1)


def _where(condition: Bool[np.ndarray, "chunks"], x: Array, other: Array) -> Array:
    return jnp.where(condition.reshape(1, -1, *[1] * (x.ndim - 2)), x, other)
