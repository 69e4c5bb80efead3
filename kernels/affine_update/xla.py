"""The affine update in plain XLA: a scan over the matrices alone.

Batched products over all chunks give what chunks add to the matrix and read of their own writes.
The backward pass computes the maps and the matrices again.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from memcache_jax._typing import Array
from memcache_jax.kernels._dispatch import for_each_unit, written
from memcache_jax.kernels.affine_update.form import AffineChunk


def affine_update(
    chunk: Callable[[Any], AffineChunk],
    state: Array | None,
    rows: Any,
    batch_dims: int,
    keep: int,
) -> tuple[Array, Array]:
    """See ``api.affine_update``."""

    def unit(state: Array | None, rows: Any) -> tuple[Array, Array]:
        ends, y = _carried(jax.vmap(chunk)(rows), state)
        return ends[keep - 1 :: keep], y

    run = for_each_unit(unit, batch_dims)
    update = jax.custom_vjp(run)

    def forward(state: Array | None, rows: Any) -> tuple[tuple[Array, Array], Any]:
        return written(run(state, rows)), (state, rows)

    def backward(residuals: Any, cotangents: tuple[Array, Array]) -> Any:
        def pull(residuals: Any, cotangents: tuple[Array, Array]) -> Any:
            return jax.vjp(unit, *residuals)[1](cotangents)

        return for_each_unit(pull, batch_dims)(residuals, cotangents)

    update.defvjp(forward, backward)
    return update(state, rows)


def _carried(form: AffineChunk, state: Array | None) -> tuple[Array, Array]:
    """Returns the matrices after each chunk, and the reads, from the maps of a run's chunks."""
    y = jnp.einsum("cmw,cwv->cmv", form.scores, form.value)
    added = jnp.einsum("cwk,cwv->ckv", form.key, form.value)
    done = 0
    if state is None:  # the first chunk has nothing to decay, erase or read
        state, done = added[0], 1
    decay, added, query, scores, key, erase = jax.tree.map(
        lambda x: x[done:], (form.decay, added, form.query, form.scores, form.key, form.erase)
    )
    erasing = 0 if erase is None else erase.shape[1]

    def step(matrix: Array, xs: tuple) -> tuple[Array, tuple[Array, Array | None]]:
        decay, added, key, erase = xs
        after = decay[:, None] * matrix + added
        if erase is None:
            return after, (matrix, None)
        erased = jnp.matmul(erase, matrix)
        return after - jnp.matmul(key.T, erased), (matrix, erased)

    end, (starts, erased) = lax.scan(step, state, (decay, added, key[:, :erasing], erase))
    old = jnp.einsum("cmk,ckv->cmv", query, starts)
    if erased is not None:
        old -= jnp.einsum("cme,cev->cmv", scores[:, :, :erasing], erased)
    ends = jnp.concatenate([starts[1 - done :], end[None]])
    return ends, y + jnp.pad(old, ((done, 0), (0, 0), (0, 0)))
