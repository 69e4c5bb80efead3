"""The affine update on TPUs by kernels that trace the chunks: their maps never leave the chip.

What passes through the main memory are the rows as they come, what the chunks read, and a matrix
now and then. The backward pass makes the maps again.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from memcache_jax._typing import Array
from memcache_jax.kernels import _sweep, _sweep_plan
from memcache_jax.kernels._block_sizes import block_sizes
from memcache_jax.kernels._dispatch import check_served, written
from memcache_jax.kernels._shapes import dtype_reasons
from memcache_jax.kernels.affine_update._maps import pull_maps, step_maps, turned
from memcache_jax.kernels.affine_update.form import AffineChunk, empty_matrices
from memcache_jax.kernels.triangular import in_whole_matrices


def affine_update(
    chunk: Callable[[Any], AffineChunk],
    state: Array | None,
    rows: Any,
    batch_dims: int,
    keep: int,
    dtype: DTypeLike,
) -> tuple[Array, Array]:
    """See ``api.affine_update``; ``dtype`` is that of what the chunks read.

    Products of bfloat16 rows are made in one pass of bfloat16 with sums in float32; those of
    float32 rows in float32, unless ``jax.default_matmul_precision`` asks for less.
    """
    if state is None:
        state = empty_matrices(chunk, rows, batch_dims).astype(jnp.float32)
    dtypes = dtype_reasons(*jax.tree.leaves((state, rows)))
    check_served("affine_update", "pallas_tpu", dtypes)
    batch = state.shape[:batch_dims]
    units = math.prod(batch)

    def flat(x: Array) -> Array:
        return x.reshape(units, *x.shape[batch_dims:])

    rows = jax.tree.map(flat, rows)
    first = turned(flat(state))
    form = jax.eval_shape(jax.vmap(jax.vmap(chunk)), rows)
    y_shape = jax.ShapeDtypeStruct((*form.query.shape[:3], form.value.shape[-1]), dtype)
    (chunks, size), name = form.query.shape[1:3], "affine_update/pallas_tpu_chunks"
    key = f"n{chunks} m{size} {state.shape[-2]}x{state.shape[-1]}"
    blocks = block_sizes(_sweep_plan.Blocks, name, key, dtype)
    plan = _sweep_plan.plan("affine_update", first, rows, y_shape, keep, blocks)

    def maps(rows: Any) -> AffineChunk:
        """The maps of some chunks, each by itself: the compiler interleaves them."""

        def one(i: int) -> AffineChunk:
            return jax.vmap(chunk)(jax.tree.map(lambda x: x[i : i + 1], rows))

        each = map(one, range(len(jax.tree.leaves(rows)[0])))
        return jax.tree.map(lambda *xs: jnp.concatenate(xs), *each)

    def step(matrix: Array, rows: Any) -> tuple[Array, Array]:
        with in_whole_matrices(), _precision(dtype):
            return step_maps(matrix, maps(rows))

    def pull(matrix: Array, rows: Any, d_after: Array, d_y: Array) -> tuple[Array, Any]:
        with in_whole_matrices(), _precision(dtype):
            form, pull_rows = jax.vjp(maps, rows)
            d_matrix, d_form = pull_maps(matrix, form, d_after, d_y)
            return d_matrix, *pull_rows(d_form)

    @jax.custom_vjp
    def update(state: Array, rows: Any) -> tuple[Array, Array]:
        return _sweep.forward(plan, step, state, rows, y_shape, starts=False)[:2]

    def forward(state: Array, rows: Any) -> tuple[tuple[Array, Array], Any]:
        ends, y, starts = written(_sweep.forward(plan, step, state, rows, y_shape))
        return (ends, y), (starts, rows)

    def backward(residuals: Any, cotangents: tuple[Array, Array]) -> tuple[Array, Any]:
        starts, rows = residuals
        late = jax.tree.map(lambda x: False, rows)
        return _sweep.backward(plan, step, pull, starts, rows, *cotangents, late)

    update.defvjp(forward, backward)
    ends, y = update(first, rows)
    ends = jnp.swapaxes(ends, -1, -2).astype(state.dtype)
    return ends.reshape(*batch, *ends.shape[1:]), y.reshape(*batch, *y.shape[1:])


def _precision(dtype: DTypeLike) -> contextlib.AbstractContextManager:
    """Float32 products for float32 rows, where nothing else is asked for."""
    config: Any = jax.config
    if config.jax_default_matmul_precision is not None or dtype == jnp.bfloat16:
        return contextlib.nullcontext()
    return jax.default_matmul_precision("highest")
