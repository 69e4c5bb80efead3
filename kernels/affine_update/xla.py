"""The affine update of matrices that start at zero, in plain XLA.

All that does not depend on the matrices is one batched product for all chunks of a run.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from memcache_jax._typing import Array
from memcache_jax.kernels._units import for_each_unit, written
from memcache_jax.kernels.affine_update.form import AffineChunk


def runs_from_zero(
    chunk: Callable[[Any], AffineChunk], rows: Any, batch_dims: int
) -> tuple[Array, Array]:
    """Runs of chunks, each from a matrix of zeros: the last matrices and what the chunks read."""

    def unit(rows: Any) -> tuple[Array, Array]:
        form = jax.vmap(chunk)(rows)
        local = jnp.einsum("cmw,cwv->cmv", form.scores, form.value)
        added = jnp.einsum("cwk,cwv->ckv", form.key, form.value)
        if len(added) == 1:
            return added[0], local
        if form.erase is None:

            def step(matrix: Array, xs: tuple) -> tuple[Array, Array]:
                decay, added = xs
                return decay[:, None] * matrix + added, matrix

            end, starts = lax.scan(step, added[0], (form.decay[1:], added[1:]))
            old = jnp.einsum("cmk,ckv->cmv", form.query[1:], starts)
        else:
            erase, m = form.erase, form.erase.shape[1]

            def step(matrix: Array, xs: tuple) -> tuple[Array, Array]:
                decay, added, key, query, scores, erase = xs
                gone = jnp.matmul(erase, matrix)
                y = jnp.matmul(query, matrix) - jnp.matmul(scores[:, :m], gone)
                return decay[:, None] * matrix + added - jnp.matmul(key[:m].T, gone), y

            end, old = lax.scan(
                step,
                added[0],
                tuple(x[1:] for x in (form.decay, added, form.key, form.query, form.scores, erase)),
            )
        return end, local + jnp.pad(old, ((1, 0), (0, 0), (0, 0)))

    @jax.custom_vjp
    def update(rows):
        return for_each_unit(unit, batch_dims)(rows)

    def forward(rows):
        return written(update(rows)), rows

    def backward(rows, cotangents):
        def pull(rows, d_end, d_y):
            return jax.vjp(unit, rows)[1]((d_end, d_y))[0]

        return (for_each_unit(pull, batch_dims)(rows, *cotangents),)

    update.defvjp(forward, backward)
    return update(rows)
