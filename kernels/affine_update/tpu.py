"""The affine update on TPUs, by kernels that keep the matrix in VMEM from chunk to chunk.

Matrices are transposed, (v, k), so that the decay of key channels is a row.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from memcache_jax._typing import Array
from memcache_jax.kernels import _sweep, _sweep_plan
from memcache_jax.kernels._sweep_plan import Blocks, Sweep
from memcache_jax.kernels.affine_update._shared import Backend, by_kernels
from memcache_jax.kernels.affine_update.form import AffineChunk

_ROWS, _TRANSPOSED, _COLUMNS = ((2,), (1,)), ((2,), (2,)), ((1,), (1,))


def affine_update(
    chunk: Callable[[Any], AffineChunk],
    state: Array | None,
    rows: Any,
    batch_dims: int,
    keep: int,
) -> tuple[Array, Array]:
    """See ``api.affine_update``."""
    backend = Backend("pallas_tpu", Blocks, plan, forward, backward)
    return by_kernels(backend, chunk, state, rows, batch_dims, keep)


def plan(form: AffineChunk, state: jax.ShapeDtypeStruct, keep: int, blocks: Blocks) -> Sweep:
    """Divides the work, or refuses."""
    turned = jax.eval_shape(_turned, state)
    return _sweep_plan.plan("affine_update", turned, form, _y(form), keep, blocks)


def forward(form: AffineChunk, state: Array, keep: int, plan: Sweep) -> tuple[Array, Array, Array]:
    """Returns matrices after every ``keep`` chunks, the outputs, and what ``backward`` needs."""
    del keep
    ends, y, starts = _sweep.forward(plan, _step, _turned(state), form, _y(form))
    return jnp.swapaxes(ends, -1, -2), y, starts


def backward(
    form: AffineChunk, starts: Array, d_ends: Array, d_y: Array, plan: Sweep
) -> tuple[AffineChunk, Array]:
    """Returns the cotangents of the form and of the first matrix."""
    late = jax.tree.map(lambda x: False, form)._replace(query=True, scores=True)
    d_state, d_form = _sweep.backward(
        plan, _step, _pull, starts, form, jnp.swapaxes(d_ends, -1, -2), d_y, late
    )
    return d_form, jnp.swapaxes(d_state, -1, -2)


def _turned(state: Array) -> Array:
    return jnp.swapaxes(state, -1, -2).astype(jnp.float32)


def _y(form: AffineChunk) -> jax.ShapeDtypeStruct:
    """Shape of what the chunks read."""
    return jax.ShapeDtypeStruct((*form.query.shape[:3], form.value.shape[-1]), form.value.dtype)


def _product(x: Array, y: Array, axes: tuple = _ROWS) -> Array:
    """The product x y of each memory, or x y^T (``_TRANSPOSED``), or x^T y (``_COLUMNS``)."""
    dims = (axes, ((0,), (0,)))
    return lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)


def _written(form: AffineChunk, matrix: Array) -> Array:
    """What chunks write if they start from these matrices: e = value - [erase M; 0]."""
    if form.erase is None:
        return form.value
    erasing = form.erase.shape[1]
    erased = form.value[:, :erasing] - _product(form.erase, matrix, _TRANSPOSED)
    if erasing == form.value.shape[1]:
        return erased
    return jnp.concatenate([erased, form.value[:, erasing:]], axis=1)


def _step(matrix: Array, form: AffineChunk) -> tuple[Array, Array]:
    written = _written(form, matrix)
    y = _product(form.query, matrix, _TRANSPOSED) + _product(form.scores, written)
    return form.decay[:, None] * matrix + _product(written, form.key, _COLUMNS), y


def _pull(matrix: Array, form: AffineChunk, d_after: Array, d_y: Array) -> tuple[Array, Any]:
    """The pullback of ``_step``, without transposed copies."""
    written = _written(form, matrix)
    d_written = _product(form.key, d_after, _TRANSPOSED) + _product(form.scores, d_y, _COLUMNS)
    d_matrix = form.decay[:, None] * d_after + _product(d_y, form.query, _COLUMNS)
    d_erase = None
    if form.erase is not None:
        d_erased = -d_written[:, : form.erase.shape[1]]
        d_erase = _product(d_erased, matrix)
        d_matrix += _product(d_erased, form.erase, _COLUMNS)
    d_form = AffineChunk(
        decay=jnp.sum(d_after * matrix, axis=1),
        value=d_written,
        key=_product(written, d_after),
        query=_product(d_y, matrix),
        scores=_product(d_y, written, _TRANSPOSED),
        erase=d_erase,
    )
    return d_matrix, d_form
