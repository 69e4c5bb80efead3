"""The chunked update on TPUs, by kernels that trace the chunk itself and its pullback."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from memcache_jax._typing import Array
from memcache_jax.kernels import _sweep, _sweep_plan
from memcache_jax.kernels._block_sizes import block_sizes
from memcache_jax.kernels._dispatch import check_served, written
from memcache_jax.kernels._shapes import dtype_reasons


def chunk_update(
    chunk: Callable[[Any, Any], tuple[Any, Any]],
    state: Any,
    rows: Any,
    batch_dims: int,
) -> tuple[Any, Any]:
    """See ``api.chunk_update``."""
    dtypes = dtype_reasons(*jax.tree.leaves((state, rows)))
    check_served("chunk_update", "pallas_tpu", dtypes)
    batch = jax.tree.leaves(rows)[0].shape[:batch_dims]
    units, chunks = math.prod(batch), jax.tree.leaves(rows)[0].shape[batch_dims]
    _, y_of_chunk = jax.eval_shape(
        chunk, _without_axes(state, batch_dims), _without_axes(rows, batch_dims + 1)
    )
    y_shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((units, chunks, *x.shape), x.dtype), y_of_chunk
    )

    def flat(x: Array) -> Array:
        return x.reshape(units, *x.shape[batch_dims:])

    def unflat(x: Array) -> Array:
        return x.reshape(*batch, *x.shape[1:])

    wide = jax.tree.map(lambda x: flat(x).astype(jnp.float32), state)
    rows = jax.tree.map(flat, rows)
    key = "+".join("x".join(map(str, x.shape[1:])) for x in jax.tree.leaves(wide))
    dtype = jax.tree.leaves(rows)[0].dtype
    name = "chunk_update/pallas_tpu"
    blocks = block_sizes(_sweep_plan.Blocks, name, f"n{chunks} {key}", dtype)
    plan = _sweep_plan.plan("chunk_update", wide, rows, y_shapes, chunks, blocks)
    step = jax.vmap(chunk)

    def pull(state: Any, rows: Any, d_after: Any, d_y: Any) -> tuple[Any, Any]:
        return jax.vjp(step, state, rows)[1]((d_after, d_y))

    @jax.custom_vjp
    def update(state: Any, rows: Any) -> tuple[Any, Any]:
        return forward(state, rows)[0]

    def forward(state: Any, rows: Any) -> tuple[tuple[Any, Any], Any]:
        ends, y, starts = written(_sweep.forward(plan, step, state, rows, y_shapes))
        return (jax.tree.map(lambda x: x[:, 0], ends), y), (starts, rows)

    def backward(residuals: tuple[Any, Any], cotangents: tuple[Any, Any]) -> tuple[Any, Any]:
        starts, rows = residuals
        d_ends, d_y = jax.tree.map(lambda x: x[:, None], cotangents[0]), cotangents[1]
        late = jax.tree.map(lambda x: False, rows)
        return _sweep.backward(plan, step, pull, starts, rows, d_ends, d_y, late)

    update.defvjp(forward, backward)
    ends, y = update(wide, rows)
    ends = jax.tree.map(lambda x, like: unflat(x).astype(like.dtype), ends, state)
    return ends, jax.tree.map(unflat, y)


def _without_axes(tree: Any, lead: int) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[lead:], x.dtype), tree)
