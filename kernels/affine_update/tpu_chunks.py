"""The affine update on TPUs by kernels that trace the chunks, so that maps never leave the chip.

Only the rows as they come, what the chunks read, and an occasional matrix pass through HBM.
The backward pass recomputes the maps.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from memcache_jax._typing import Array
from memcache_jax.kernels import _sweep, _sweep_plan
from memcache_jax.kernels._block_sizes import block_sizes
from memcache_jax.kernels._dispatch import CannotServeError, check_served, written
from memcache_jax.kernels._shapes import dtype_reasons
from memcache_jax.kernels._sweep_blocks import units_first
from memcache_jax.kernels._sweep_order import Order
from memcache_jax.kernels.affine_update._maps import pull_maps, step_maps, turned
from memcache_jax.kernels.affine_update.form import AffineChunk, OnChip, empty_matrices
from memcache_jax.kernels.triangular import in_whole_matrices


def affine_update(
    chunk: Callable[[Any], AffineChunk],
    state: Array | None,
    rows: Any,
    batch_dims: int,
    keep: int,
    on_chip: OnChip,
) -> tuple[Array, Array]:
    """See ``api.affine_update``. The second axis of the batch is heads.

    Products of bfloat16 rows take one bfloat16 pass with float32 accumulation; those of float32
    rows are in float32, unless ``jax.default_matmul_precision`` asks for less.
    """
    if state is None:
        state = empty_matrices(chunk, rows, batch_dims).astype(jnp.float32)
    dtypes = dtype_reasons(*jax.tree.leaves((state, rows)))
    check_served("affine_update", "pallas_tpu", dtypes)
    every = _Rows(rows, on_chip.spoilt)
    order = Order(state.shape[:batch_dims])
    first = turned(order.of_units(state))

    def planned(inside: bool) -> tuple[Any, Any, Any]:
        packed = jax.eval_shape(lambda x: order.packed(x, inside), every)
        form = jax.eval_shape(jax.vmap(jax.vmap(chunk)), units_first(packed).rows)
        shape = (*form.query.shape[:3], form.value.shape[-1])
        y = jax.eval_shape(
            lambda: order.packed(order.of_batch(jnp.zeros(shape, on_chip.dtype)), inside)
        )
        name = "affine_update/pallas_tpu_chunks"
        key = f"n{shape[1]} m{shape[2]} {state.shape[-2]}x{state.shape[-1]}"
        blocks = block_sizes(_sweep_plan.Blocks, name, key, on_chip.dtype)
        return _sweep_plan.plan("affine_update", first, packed, y, keep, blocks), y, inside

    try:
        plan, y_shape, inside = planned(order.heads > 1)
    except CannotServeError:
        plan, y_shape, inside = planned(False)
    plan = plan._replace(**{name: _HEADROOM * getattr(plan, name) for name in _BYTES})
    step, pull = _kernels(chunk, on_chip.dtype)
    late = _Rows(on_chip.late, None if on_chip.spoilt is None else True)

    @jax.custom_vjp
    def update(state: Array, rows: Any) -> tuple[Array, Any]:
        return _sweep.forward(plan, step, state, rows, y_shape, starts=False)[:2]

    def forward(state: Array, rows: Any) -> tuple[tuple[Array, Any], Any]:
        ends, y, starts = written(_sweep.forward(plan, step, state, rows, y_shape))
        return (ends, y), (starts, rows)

    def backward(residuals: Any, cotangents: tuple[Array, Any]) -> tuple[Array, Any]:
        starts, rows = residuals
        return _sweep.backward(plan, step, pull, starts, rows, *cotangents, late)

    update.defvjp(forward, backward)
    ends, y = update(first, order.packed(every, inside))
    ends = order.of_batch(jnp.swapaxes(ends, -1, -2).astype(state.dtype))
    return ends, order.unpacked(y)


# The plan's estimate suits most rules; RWKV-7's backward pass takes 1.6 times as much.
_HEADROOM, _BYTES = 2, ("forward_bytes", "backward_bytes")


class _Rows(NamedTuple):
    """What the kernels read: rows, and which of them are spoilt (None for none)."""

    rows: Any
    spoilt: Any


def _kernels(chunk: Callable[[Any], AffineChunk], dtype: DTypeLike) -> tuple[Callable, Callable]:
    """A step of some matrices through a chunk of each, and its pullback."""

    def maps(rows: Any) -> AffineChunk:
        """The maps of some chunks, each by itself: the compiler interleaves them."""

        def one(i: int) -> AffineChunk:
            return jax.vmap(chunk)(jax.tree.map(lambda x: x[i : i + 1], rows))

        each = map(one, range(len(jax.tree.leaves(rows)[0])))
        return jax.tree.map(lambda *xs: jnp.concatenate(xs), *each)

    def step(matrix: Array, every: _Rows) -> tuple[Array, Array]:
        with in_whole_matrices(), _precision(dtype):
            after, y = step_maps(matrix, maps(every.rows))
        return after, _where_spoilt(every.spoilt, jnp.nan, y)

    def pull(matrix: Array, every: _Rows, d_after: Array, d_y: Array) -> tuple[Array, _Rows]:
        d_y = _where_spoilt(every.spoilt, 0.0, d_y)
        with in_whole_matrices(), _precision(dtype):
            form, pull_rows = jax.vjp(maps, every.rows)
            d_matrix, d_form = pull_maps(matrix, form, d_after, d_y)
            (d_rows,) = pull_rows(d_form)
        return d_matrix, _Rows(d_rows, jax.tree.map(jnp.zeros_like, every.spoilt))

    return step, pull


def _where_spoilt(spoilt: Array | None, value: float, y: Array) -> Array:
    return y if spoilt is None else jnp.where(spoilt[..., None] > 0, value, y)


def _precision(dtype: DTypeLike) -> contextlib.AbstractContextManager:
    """Float32 products for float32 rows, unless the user has set a precision."""
    config: Any = jax.config
    if config.jax_default_matmul_precision is not None or dtype == jnp.bfloat16:
        return contextlib.nullcontext()
    return jax.default_matmul_precision("highest")
