"""The chunked update on TPUs, by kernels that trace the chunk itself and its pullback."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from memcache_jax.kernels import _sweep, _sweep_heads, _sweep_plan
from memcache_jax.kernels._block_sizes import block_sizes
from memcache_jax.kernels._dispatch import CannotServeError, check_served, written
from memcache_jax.kernels._shapes import dtype_reasons
from memcache_jax.kernels._sweep_order import Order


def chunk_update(
    chunk: Callable[[Any, Any], tuple[Any, Any]],
    state: Any,
    rows: Any,
    batch_dims: int,
    late: Any = None,
) -> tuple[Any, Any]:
    """See ``api.chunk_update``.

    Kernels read rows and write outputs in the dtypes that these have, and compute in float32.
    With ``late``, tokens of several heads are read in the model's layout if they fit into VMEM.
    """
    dtypes = dtype_reasons(*jax.tree.leaves((state, rows)))
    check_served("chunk_update", "pallas_tpu", dtypes)
    order = Order(jax.tree.leaves(rows)[0].shape[:batch_dims])
    chunks = jax.tree.leaves(rows)[0].shape[batch_dims]
    _, y_of_chunk = jax.eval_shape(
        chunk, _without_axes(state, batch_dims), _without_axes(rows, batch_dims + 1)
    )
    y_shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((*order.batch, chunks, *x.shape), x.dtype), y_of_chunk
    )
    first = jax.tree.map(lambda x: order.of_units(x).astype(jnp.float32), state)
    key = "+".join("x".join(map(str, x.shape[1:])) for x in jax.tree.leaves(first))
    dtype = jax.tree.leaves(rows)[0].dtype
    name = "chunk_update/pallas_tpu"
    blocks = block_sizes(_sweep_plan.Blocks, name, f"n{chunks} {key}", dtype)

    def planned(inside: bool) -> tuple[Any, Any, bool]:
        packed, y = jax.eval_shape(lambda *xs: order.packed(xs, inside), rows, y_shapes)
        make = _sweep_plan.plan_heads if inside else _sweep_plan.plan
        return make("chunk_update", first, packed, y, chunks, blocks), y, inside

    tokens = late is not None and order.heads > 1 and _are_tokens(y_of_chunk)
    try:
        plan, y_packed, inside = planned(tokens)
    except CannotServeError:
        plan, y_packed, inside = planned(False)
    late = jax.tree.map(lambda x: False, rows) if late is None else late
    step = jax.vmap(chunk)

    def pull(state: Any, rows: Any, d_after: Any, d_y: Any) -> tuple[Any, Any]:
        (_, y), back = jax.vjp(step, state, rows)
        return back((d_after, jax.tree.map(lambda d, x: d.astype(x.dtype), d_y, y)))

    def run(state: Any, rows: Any, starts: bool) -> tuple[tuple[Any, Any], Any]:
        sweep = _sweep_heads if inside else _sweep
        ends, y, kept = sweep.forward(plan, step, state, rows, y_packed, starts=starts)
        return (jax.tree.map(lambda x: x[:, 0], ends), y), kept

    @jax.custom_vjp
    def update(state: Any, rows: Any) -> tuple[Any, Any]:
        return run(state, rows, False)[0]

    def forward(state: Any, rows: Any) -> tuple[tuple[Any, Any], Any]:
        outputs, starts = written(run(state, rows, True))
        return outputs, (starts, rows)

    def backward(residuals: tuple[Any, Any], cotangents: tuple[Any, Any]) -> tuple[Any, Any]:
        starts, rows = residuals
        d_ends, d_y = jax.tree.map(lambda x: x[:, None], cotangents[0]), cotangents[1]
        if inside:
            return _sweep_heads.backward(plan, step, pull, starts, rows, d_ends, d_y)
        return _sweep.backward(plan, step, pull, starts, rows, d_ends, d_y, late)

    update.defvjp(forward, backward)
    ends, y = update(first, order.packed(rows, inside))
    ends = jax.tree.map(lambda x, like: order.of_batch(x).astype(like.dtype), ends, state)
    return ends, order.unpacked(y)


def _are_tokens(y: Any) -> bool:
    """Whether a chunk returns one array of rows, and nothing else."""
    leaves = jax.tree.leaves(y)
    return len(leaves) == 1 and leaves[0].ndim == 2


def _without_axes(tree: Any, lead: int) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[lead:], x.dtype), tree)
