"""The affine update as a plain scan, differentiated by JAX."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from memcache_jax._typing import Array
from memcache_jax.kernels.affine_update.form import AffineChunk, empty_matrices


def affine_update(
    chunk: Callable[[Any], AffineChunk],
    state: Array | None,
    rows: Any,
    batch_dims: int,
    keep: int,
) -> tuple[Array, Array]:
    """See ``api.affine_update``."""
    state = empty_matrices(chunk, rows, batch_dims) if state is None else state

    def step(matrix: Array, rows: Any) -> tuple[Array, tuple[Array, Array]]:
        after, y = chunk(rows)(matrix)
        return after, (after, y)

    def unit(state: Array, rows: Any) -> tuple[Array, Array]:
        _, (after, y) = lax.scan(step, state, rows)
        return after[keep - 1 :: keep], y

    for _ in range(batch_dims):
        unit = jax.vmap(unit)
    return unit(state, rows)
