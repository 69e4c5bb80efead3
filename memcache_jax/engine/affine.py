"""Writing blocks of an affine memory: the maps of all chunks are made at once, then applied."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Bool, Float, State
from memcache_jax.engine.finite import as_they_came, spoilt, with_finite_writes
from memcache_jax.engine.types import Rows, Views, Writing
from memcache_jax.kernels._dispatch import CannotServeError
from memcache_jax.kernels.affine_update import AffineChunk, OnChip, affine_update
from memcache_jax.memories import AffineMemory
from memcache_jax.memories.base import first_of_documents


def write_affine(how: Writing, rows: Rows, restarts: Bool[np.ndarray, "n"]) -> tuple[State, Views]:
    """``write_blocks`` for a memory of the form ``"affine"``, keeping its reads alone.

    If all blocks begin anew they run side by side. If some do, their maps ignore the matrix before
    them. A block that begins anew starts from a zero matrix.
    """
    memory, key = how.memory, rows.key
    assert isinstance(memory, AffineMemory)
    batch, chunks = key.shape[:3], key.shape[3]
    apart = restarts.all()
    lead = batch if apart else batch[:2]
    begins = np.outer(restarts, np.arange(chunks) == 0)
    begins[0, 0] = True

    # Everything in the state except the matrix is known up front, and zero where runs begin.
    carried = _for_each(memory.carried, 4)(key, rows.value)._replace(matrix=None)
    before = jax.tree.map(lambda x: _of_chunk_before(x, ~begins), carried)
    first = None if apart else how.initial(lead)
    if first is not None:
        before = jax.tree.map(
            lambda x, first: x.at[:, :, 0, 0].set(first), before, first._replace(matrix=None)
        )
    goes_on = None
    if not apart and begins.sum() > 1:
        goes_on = jnp.broadcast_to(jnp.asarray(~begins, key.dtype), key.shape[:4])

    def chunk(operands: tuple) -> AffineChunk:
        before, goes_on, rows = operands
        matrix = jnp.zeros((rows.key.shape[-1], rows.value.shape[-1]), rows.key.dtype)
        controls = rows.controls
        if rows.begun is not None:
            controls = memory.forgetting(controls, first_of_documents(rows.begun.astype(jnp.int32)))
        before = before._replace(matrix=matrix)
        form = memory.affine(before, rows.key, rows.value, rows.query, controls)
        return form if goes_on is None else _detached(form, goes_on)

    def clean_chunk(operands: tuple) -> AffineChunk:
        before, goes_on, rows = operands
        return chunk((before, goes_on, with_finite_writes(rows)))

    def update(rows: Rows, chunk: Callable, on_chip: OnChip | None = None) -> tuple[Array, Array]:
        return affine_update(
            chunk,
            None if first is None else first.matrix,
            flat((before, goes_on, rows)),
            batch_dims=len(lead),
            keep=chunks,
            implementation=how.implementation,
            on_chip=on_chip,
        )

    def flat(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(*lead, -1, *x.shape[4:]), tree)

    def made_on_chip() -> tuple[Array, Array]:
        came = _came_forgetting(memory, rows)
        dtype = jnp.result_type(came.query, came.key, came.value)
        late = jax.tree.map(lambda x: False, (before, goes_on, came))
        late = (*late[:2], late[2]._replace(query=True))
        lost = spoilt(memory, rows, restarts)
        lost = None if lost is None else flat(lost.astype(jnp.float32))
        return update(came, clean_chunk, OnChip(dtype, late, lost))

    last = jax.tree.map(lambda x: x[:, :, :, -1], carried)

    def result(ends: Array, y: Array) -> tuple[State, Views]:
        states = last._replace(matrix=ends.reshape(*batch, *ends.shape[-2:]))
        return states, {"reads": y.reshape(*rows.query.shape[:-1], -1)}

    finite = rows._replace(bad=None, came=None)
    if how.implementation != "pallas_tpu" or rows.came is None:
        return result(*update(finite, chunk))
    try:
        states, views = result(*made_on_chip())
        return states, {**views, "spoilt": None}
    except CannotServeError as error:
        refused = error
    # Larger states may fit kernels that are given the maps.
    try:
        return result(*update(finite, chunk))
    except CannotServeError as error:
        raise CannotServeError(f"{error}; with maps made in the kernels: {refused}") from refused


def _came_forgetting(memory: AffineMemory, rows: Rows) -> Rows:
    """``as_they_came``, with documents as controls that forget."""
    came = as_they_came(rows)
    if rows.begun is None:
        return came
    firsts = _for_each(first_of_documents, 4)(rows.begun.astype(jnp.int32))
    controls = _for_each(memory.forgetting, 4)(came.controls, firsts)
    made = {
        name: x.astype(jnp.float32) for name, x in controls.items() if name not in came.controls
    }
    return came._replace(controls={**controls, **made})


def _for_each(function: Callable, dims: int) -> Callable:
    for _ in range(dims):
        function = jax.vmap(function)
    return function


def _of_chunk_before(
    x: Float[Array, "b h n chunks *rest"], there: Bool[np.ndarray, "n chunks"]
) -> Float[Array, "b h n chunks *rest"]:
    """The value of the chunk before each one, zero where there is none."""
    flat = x.reshape(*x.shape[:2], -1, *x.shape[4:])
    before = jnp.pad(flat[:, :, :-1], [(int(axis == 2), 0) for axis in range(flat.ndim)])
    there = there.reshape(1, 1, *there.shape, *[1] * (x.ndim - 4))
    return jnp.where(there, before.reshape(x.shape), 0)  # 0 * NaN is NaN


def _detached(form: AffineChunk, goes_on: Float[Array, ""]) -> AffineChunk:
    """The map without its dependence on the matrix before, where a run begins."""
    erase = None if form.erase is None else goes_on * form.erase
    return form._replace(decay=goes_on * form.decay, query=goes_on * form.query, erase=erase)
