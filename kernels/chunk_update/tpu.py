"""The chunked update on TPUs, by kernels that trace the chunk itself and its pullback."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from memcache_jax.kernels import _sweep, _sweep_heads, _sweep_plan
from memcache_jax.kernels._block_sizes import block_sizes
from memcache_jax.kernels._dispatch import CannotServeError, check_served, written
from memcache_jax.kernels._shapes import dtype_reasons
from memcache_jax.kernels._sweep_order import Order
from memcache_jax.kernels.chunk_update.edges import Edges


def chunk_update(
    chunk: Callable[[Any, Any], tuple[Any, Any]],
    given: Any,
    rows: Any,
    batch_dims: int,
    late: Any,
    edges: Edges,
) -> tuple[Any, Any]:
    """See ``api.chunk_update``.

    Kernels read rows and write outputs in the dtypes that these have, and compute in float32.
    With ``late``, tokens of several heads are read in the model's layout if they fit into VMEM.
    """
    dtypes = dtype_reasons(*jax.tree.leaves((given, rows)))
    check_served("chunk_update", "pallas_tpu", dtypes)
    order = Order(jax.tree.leaves(rows)[0].shape[:batch_dims])
    chunks = jax.tree.leaves(rows)[0].shape[batch_dims]
    state = jax.eval_shape(edges.begin, _without_axes(given, batch_dims))
    ends = jax.eval_shape(edges.finish, state)
    _, y_of_chunk = jax.eval_shape(chunk, state, _without_axes(rows, batch_dims + 1))
    y_shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((*order.batch, chunks, *x.shape), x.dtype), y_of_chunk
    )
    key = "+".join("x".join(map(str, x.shape)) for x in jax.tree.leaves(state))
    dtype = jax.tree.leaves(rows)[0].dtype
    name = "chunk_update/pallas_tpu"
    blocks = block_sizes(_sweep_plan.Blocks, name, f"n{chunks} {key}", dtype)
    step = jax.vmap(chunk)

    def units_of(tree: Any) -> Any:
        return jax.tree.map(lambda x: order.of_units(x).astype(jnp.float32), tree)

    def planned(inside: bool) -> tuple[Any, Any, Any, bool]:
        first = units_of(given if inside else edges.first(given, order.batch))
        packed, y = jax.eval_shape(lambda *xs: order.packed(xs, inside), rows, y_shapes)
        sizes = packed, y, chunks, blocks
        if not inside:
            return _sweep_plan.plan("chunk_update", first, *sizes), first, y, inside
        units = math.prod(order.batch)
        states = jax.tree.map(lambda x: jax.ShapeDtypeStruct((units, *x.shape), jnp.float32), state)
        return _sweep_plan.plan_heads("chunk_update", states, first, *sizes), first, y, inside

    try:
        plan, first, y_packed, inside = planned(
            late is not None and order.heads > 1 and _are_tokens(y_of_chunk)
        )
    except CannotServeError:
        plan, first, y_packed, inside = planned(False)
    late = jax.tree.map(lambda x: False, rows) if late is None else late

    def pull(state: Any, rows: Any, d_after: Any, d_y: Any) -> tuple[Any, Any]:
        (_, y), back = jax.vjp(step, state, rows)
        return back((d_after, jax.tree.map(lambda d, x: d.astype(x.dtype), d_y, y)))

    def run(first: Any, rows: Any, starts: bool) -> tuple[tuple[Any, Any], Any]:
        if inside:
            ends, y, kept = _sweep_heads.forward(
                plan, step, edges, first, rows, y_packed, starts=starts and plan.every > 1
            )
            return (ends, y), kept
        ends, y, kept = _sweep.forward(plan, step, first, rows, y_packed, starts=starts)
        return (jax.tree.map(lambda x: x[:, 0], ends), y), kept

    @jax.custom_vjp
    def update(first: Any, rows: Any) -> tuple[Any, Any]:
        return run(first, rows, False)[0]

    def forward(first: Any, rows: Any) -> tuple[tuple[Any, Any], Any]:
        outputs, starts = written(run(first, rows, True))
        return outputs, (first if inside else None, starts, rows)

    def backward(residuals: tuple[Any, Any, Any], cotangents: tuple[Any, Any]) -> tuple[Any, Any]:
        first, starts, rows = residuals
        d_ends, d_y = cotangents
        if inside:
            return _sweep_heads.backward(plan, step, pull, edges, first, starts, rows, d_ends, d_y)
        d_ends = jax.tree.map(lambda x: x[:, None], d_ends)
        return _sweep.backward(plan, step, pull, starts, rows, d_ends, d_y, late)

    update.defvjp(forward, backward)
    last, y = update(first, order.packed(rows, inside))
    last = last if inside else edges.finish(last)
    last = jax.tree.map(lambda x, like: order.of_batch(x).astype(like.dtype), last, ends)
    return last, order.unpacked(y)


def _are_tokens(y: Any) -> bool:
    """Whether a chunk returns one array of rows, and nothing else."""
    leaves = jax.tree.leaves(y)
    return len(leaves) == 1 and leaves[0].ndim == 2


def _without_axes(tree: Any, lead: int) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[lead:], x.dtype), tree)
