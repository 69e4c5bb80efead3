"""Maps of chunks applied to matrices in VMEM, and the pullback.

Matrices are transposed, (v, k), so that the decay of key channels is a row.
"""

import jax.numpy as jnp
from jax import lax

from memcache_jax._typing import Array
from memcache_jax.kernels.affine_update.form import AffineChunk

_ROWS, _TRANSPOSED, _COLUMNS = ((2,), (1,)), ((2,), (2,)), ((1,), (1,))


def turned(state: Array) -> Array:
    """Matrices (units, k, v) as kernels keep them."""
    return jnp.swapaxes(state, -1, -2).astype(jnp.float32)


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


def step_maps(matrix: Array, form: AffineChunk) -> tuple[Array, Array]:
    """The matrices (some, v, k) after chunks, and what their rows read."""
    written = _written(form, matrix)
    y = _product(form.query, matrix, _TRANSPOSED) + _product(form.scores, written)
    return form.decay[:, None] * matrix + _product(written, form.key, _COLUMNS), y


def pull_maps(
    matrix: Array, form: AffineChunk, d_after: Array, d_y: Array
) -> tuple[Array, AffineChunk]:
    """The pullback of ``step_maps``, without transposed copies."""
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
