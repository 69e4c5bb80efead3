"""Writing blocks of a deep memory by the kernel that carries it through all of their chunks."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Bool, State
from memcache_jax.kernels._dispatch import check_served, written
from memcache_jax.kernels._shapes import power_of_two
from memcache_jax.kernels.deep_update import deep_update
from memcache_jax.memories.deep import DeepMemory, DeepState
from memcache_jax.memories.dla import DLA
from memcache_jax.memories.titans import Titans


def write_deep(
    memory: DeepMemory,
    write: Callable[[tuple, tuple], tuple[tuple, Any]],
    start: Callable[[tuple[int, ...]], tuple],
    rows: tuple,
    restarts: Bool[np.ndarray, "n"],
    implementation: str,
) -> tuple[State, Any]:
    """``write_blocks`` where the recurrence makes the states that chunks start from, no more.

    From these all chunks are written and read side by side. The backward pass makes all that anew.
    The states of all chunks are held at once, forward too.

    Args:
      memory: a memory that overrides nothing that the kernels have of their own.
      write: of ``chunk_writer``.
      start: of ``chunk_writer``.
      rows: as for ``write_blocks``.
      restarts: whether each block begins anew. Where all do, they run side by side.
      implementation: of ``deep_update``.
    """
    check_served("deep_update", implementation, _reasons(memory, *rows[1:3]))
    batch, chunks = rows[1].shape[:3], rows[1].shape[3]
    lead = batch if restarts.all() else batch[:2]
    units, count = math.prod(lead), math.prod(batch[len(lead) :]) * chunks
    begins = np.outer(restarts, np.arange(chunks) == 0).reshape(-1)[:count]
    begins[0] = True

    def run(first: tuple, rows: tuple) -> tuple[State, Any]:
        states, goes_on = first[0], jnp.broadcast_to(~begins, (units, count))
        given = jax.tree.map(
            lambda x: jnp.broadcast_to(x[:, None], (units, count, *x.shape[1:])), states
        )
        write_each = jax.vmap(jax.vmap(write, in_axes=((0, None), 0)))
        if rows[4] is not None:
            # The end of a chunk in which a document begins depends on no earlier state.
            (ends, _), _ = write_each((given, first[1]), rows)
            given = jax.tree.map(lambda x, end: _where(begins, x, _after(end)), given, ends)
            goes_on &= ~_after(rows[4][..., -1] > 0)
        starts = DeepState(
            *deep_update(
                jax.vmap(jax.vmap(memory.descent))(*rows[1:4]),
                tuple(part for part in given if part),
                goes_on.astype(rows[1].dtype),
                loss=memory.loss,
                implementation=implementation,
            )
        )
        _, kept = write_each((starts, first[1]), rows)
        last = jax.tree.map(lambda x: x[:, chunks - 1 :: chunks], (starts, rows))
        (ends, _), _ = write_each((last[0], first[1]), last[1])
        return ends, kept

    @jax.custom_vjp
    def update(first: tuple, rows: tuple) -> tuple[State, Any]:
        return run(first, rows)

    def forward(first: tuple, rows: tuple) -> tuple[tuple[State, Any], tuple]:
        return written(run(first, rows)), (first, rows)

    def backward(residuals: tuple, cotangents: tuple[State, Any]) -> tuple:
        return jax.vjp(run, *residuals)[1](cotangents)

    update.defvjp(forward, backward)
    first = jax.tree.map(lambda x: x.reshape(units, *x.shape[len(lead) :]), start(lead))
    ends, kept = update(first, jax.tree.map(lambda x: x.reshape(units, count, *x.shape[4:]), rows))
    ends = jax.tree.map(lambda x: x.reshape(*batch, *x.shape[2:]), ends)
    return ends, jax.tree.map(lambda x: x.reshape(*batch, chunks, *x.shape[2:]), kept)


def _reasons(memory: DeepMemory, key: Array, value: Array) -> list[tuple[bool, str]]:
    """Why kernels cannot serve a memory, for ``check_served``."""
    kind = type(memory)
    own = memory.overridden(DeepMemory, "forward", "init", "write", "write_documents")
    sizes = (*key.shape[-2:], value.shape[-1])
    filled = any(size != power_of_two(size) for size in sizes)
    return [
        (bool(own), f"{kind.__name__} overrides {', '.join(own)}"),
        (
            filled and kind.loss not in (Titans.loss, DLA.loss),
            f"the loss of {kind.__name__} is taken of chunks that are not filled up: rows, key and "
            f"value dimension, {sizes}, must be powers of two from 16 on",
        ),
    ]


def _after(x: Array) -> Array:
    """What the chunk before each one has, (units, chunks, ...)."""
    return jnp.roll(x, 1, axis=1)


def _where(condition: Bool[np.ndarray, "chunks"], x: Array, other: Array) -> Array:
    return jnp.where(condition.reshape(1, -1, *[1] * (x.ndim - 2)), x, other)
