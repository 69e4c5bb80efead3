"""Writing blocks of a matrix memory by maps of its matrix, those of all chunks made at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Bool, Float, State
from memcache_jax.kernels._dispatch import CannotServeError
from memcache_jax.kernels.affine_update import AffineChunk, affine_update
from memcache_jax.memories import Memory
from memcache_jax.memories.base import first_of_documents


def write_affine(
    memory: Memory,
    live: Callable[[Any, Array], Any],
    initial: Callable[[tuple[int, ...]], State],
    rows: tuple,
    restarts: Bool[np.ndarray, "n"],
    implementation: str | None,
) -> tuple[State, Any]:
    """``write_blocks`` for a memory whose chunks are affine maps of its matrix.

    Args:
      memory: a memory that has ``affine``.
      live: as for ``write_blocks``; it may read the live memory with the queries, and no more.
      initial: as for ``write_blocks``; where blocks begin anew, their matrix is zero.
      rows: as for ``write_blocks``.
      restarts: whether each block begins anew. Where all do, they run side by side; where some do,
        their maps leave nothing of the matrix.
      implementation: of ``affine_update``.
    """
    query, key, value, *_ = rows
    batch, chunks = key.shape[:3], key.shape[3]
    apart = restarts.all()
    lead = batch if apart else batch[:2]
    begins = np.outer(restarts, np.arange(chunks) == 0)
    begins[0, 0] = True

    # What of the states is known at once; where runs begin it is zero, as the matrix.
    carried = _for_each(memory.carried, 4)(key, value)._replace(matrix=None)
    before = jax.tree.map(lambda x: _of_chunk_before(x, ~begins), carried)
    goes_on = None
    if not apart and begins.sum() > 1:
        goes_on = jnp.broadcast_to(jnp.asarray(~begins, key.dtype), key.shape[:4])

    def chunk(rows: tuple) -> AffineChunk:
        before, goes_on, query, key, value, controls, document = rows
        before = before._replace(matrix=jnp.zeros((key.shape[-1], value.shape[-1]), key.dtype))
        if document is not None:
            # It came as a float, for a program's cotangents.
            begins = first_of_documents(document.astype(jnp.int32))
            controls = memory.forgetting(controls, begins)
        form = memory.affine(before, key, value, query, controls)
        return form if goes_on is None else _detached(form, goes_on)

    ends, y = affine_update(
        chunk,
        None if apart else initial(lead).matrix,
        jax.tree.map(lambda x: x.reshape(*lead, -1, *x.shape[4:]), (before, goes_on, *rows)),
        batch_dims=len(lead),
        keep=chunks,
        implementation=implementation,
    )
    last = jax.tree.map(lambda x: x[:, :, :, -1], carried)
    states = last._replace(matrix=ends.reshape(*batch, *ends.shape[-2:]))
    y = y.reshape(*query.shape[:-1], -1)
    return states, _for_each(lambda y, query: live(_Reads(query, y), query), 4)(y, query)


class _Reads:
    """The view of a chunk that was read with its queries, and that has nothing else."""

    def __init__(self, query: Float[Array, "m k"], y: Float[Array, "m v"]) -> None:
        self._query, self._y = query, y

    def apply(self, x: Float[Array, "m k"]) -> Float[Array, "m v"]:
        """The reads."""
        if x is not self._query:
            raise CannotServeError("the live memory was read with the queries alone")
        return self._y

    def __getattr__(self, name: str) -> Any:
        raise CannotServeError(f"of the live memory there are only reads, no {name}")


def _for_each(function: Callable, dims: int) -> Callable:
    for _ in range(dims):
        function = jax.vmap(function)
    return function


def _of_chunk_before(
    x: Float[Array, "b h n chunks *rest"], there: Bool[np.ndarray, "n chunks"]
) -> Float[Array, "b h n chunks *rest"]:
    """What the chunk before each one has, zero where there is none."""
    flat = x.reshape(*x.shape[:2], -1, *x.shape[4:])
    before = jnp.pad(flat[:, :, :-1], [(int(axis == 2), 0) for axis in range(flat.ndim)])
    there = there.reshape(1, 1, *there.shape, *[1] * (x.ndim - 4))
    return jnp.where(there, before.reshape(x.shape), 0)  # 0 * NaN is NaN


def _detached(form: AffineChunk, goes_on: Float[Array, ""]) -> AffineChunk:
    """The map with nothing left of the matrix where a run begins."""
    erase = None if form.erase is None else goes_on * form.erase
    return form._replace(decay=goes_on * form.decay, query=goes_on * form.query, erase=erase)
