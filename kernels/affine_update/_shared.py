"""What the kernels of the affine update share: the differentiable call around them.

The backward pass computes the maps again, so that none is kept.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from memcache_jax._typing import Array
from memcache_jax.kernels._block_sizes import block_sizes
from memcache_jax.kernels._dispatch import check_served, written
from memcache_jax.kernels._shapes import dtype_reasons
from memcache_jax.kernels.affine_update.form import AffineChunk, empty_matrices


class Backend(NamedTuple):
    """The kernels of a platform.

    Attributes:
      implementation: its name.
      blocks: the dataclass of its block sizes.
      plan: (form, first states, keep, block sizes) -> how the kernels run; raises CannotServeError
        for what they cannot take.
      forward: (form, states, keep, plan) -> (ends, outputs, residuals).
      backward: (form, residuals, cotangents of ends and outputs, plan) -> cotangents of the form
        and the states.
    """

    implementation: str
    blocks: type
    plan: Callable[..., Any]
    forward: Callable[..., tuple[Array, Array, Any]]
    backward: Callable[..., tuple[AffineChunk, Array]]


def by_kernels(
    backend: Backend,
    chunk: Callable[[Any], AffineChunk],
    state: Array | None,
    rows: Any,
    batch_dims: int,
    keep: int,
) -> tuple[Array, Array]:
    """The affine update of arguments as in ``api.affine_update``, through a backend's kernels."""
    state = empty_matrices(chunk, rows, batch_dims) if state is None else state
    dtypes = dtype_reasons(*jax.tree.leaves((state, rows)))
    check_served("affine_update", backend.implementation, dtypes)
    batch = state.shape[:batch_dims]

    def flat(x: Array) -> Array:
        return x.reshape(math.prod(batch), *x.shape[batch_dims:])

    state, rows = flat(state), jax.tree.map(flat, rows)
    chunks = jax.vmap(jax.vmap(chunk))
    form, first = jax.eval_shape(lambda state, rows: (chunks(rows), state), state, rows)
    name = f"affine_update/{backend.implementation}"
    blocks = block_sizes(backend.blocks, name, _shape_key(form), form.value.dtype)
    plan = backend.plan(form, first, keep, blocks)

    @jax.custom_vjp
    def update(state: Array, rows: Any) -> tuple[Array, Array]:
        return forward(state, rows)[0]

    def forward(state: Array, rows: Any) -> tuple[tuple[Array, Array], Any]:
        ends, y, starts = written(backend.forward(chunks(rows), state, keep, plan))
        return (ends.astype(state.dtype), y), (rows, starts)

    def backward(residuals: Any, cotangents: tuple[Array, Array]) -> tuple[Array, Any]:
        rows, starts = residuals
        form, pull = jax.vjp(chunks, rows)
        d_form, d_state = backend.backward(form, starts, *cotangents, plan)
        return d_state.astype(cotangents[0].dtype), *pull(d_form)

    update.defvjp(forward, backward)
    ends, y = update(state, rows)
    return ends.reshape(*batch, *ends.shape[1:]), y.reshape(*batch, *y.shape[1:])


def _shape_key(form: AffineChunk) -> str:
    """Key for measured block sizes."""
    (chunks, writes, values), (rows, keys) = form.value.shape[1:], form.query.shape[2:]
    erasing = 0 if form.erase is None else form.erase.shape[2]
    return f"n{chunks} m{rows} w{writes} e{erasing} {keys}x{values}"
