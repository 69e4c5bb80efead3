"""The affine update on TPUs, by kernels that keep the matrix in VMEM from chunk to chunk.

The maps of all chunks are made outside.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from memcache_jax._typing import Array
from memcache_jax.kernels import _sweep, _sweep_plan
from memcache_jax.kernels._sweep_plan import Blocks, Sweep
from memcache_jax.kernels.affine_update._maps import pull_maps, step_maps, turned
from memcache_jax.kernels.affine_update._shared import Backend, by_kernels
from memcache_jax.kernels.affine_update.form import AffineChunk


def affine_update(
    chunk: Callable[[Any], AffineChunk],
    state: Array | None,
    rows: Any,
    batch_dims: int,
    keep: int,
) -> tuple[Array, Array]:
    """See ``api.affine_update``."""
    backend = Backend("pallas_tpu", Blocks, plan, forward, backward)
    return by_kernels(backend, chunk, state, rows, batch_dims, keep)


def plan(form: AffineChunk, state: jax.ShapeDtypeStruct, keep: int, blocks: Blocks) -> Sweep:
    """Divides the work, or refuses."""
    first = jax.eval_shape(turned, state)
    return _sweep_plan.plan("affine_update", first, form, _y(form), keep, blocks)


def forward(form: AffineChunk, state: Array, keep: int, plan: Sweep) -> tuple[Array, Array, Array]:
    """Returns matrices after every ``keep`` chunks, the outputs, and what ``backward`` needs."""
    del keep
    ends, y, starts = _sweep.forward(plan, step_maps, turned(state), form, _y(form))
    return jnp.swapaxes(ends, -1, -2), y, starts


def backward(
    form: AffineChunk, starts: Array, d_ends: Array, d_y: Array, plan: Sweep
) -> tuple[AffineChunk, Array]:
    """Returns the cotangents of the form and of the first matrix."""
    late = jax.tree.map(lambda x: False, form)._replace(query=True, scores=True)
    d_state, d_form = _sweep.backward(
        plan, step_maps, pull_maps, starts, form, jnp.swapaxes(d_ends, -1, -2), d_y, late
    )
    return d_form, jnp.swapaxes(d_state, -1, -2)


def _y(form: AffineChunk) -> jax.ShapeDtypeStruct:
    """Shape of what the chunks read."""
    return jax.ShapeDtypeStruct((*form.query.shape[:3], form.value.shape[-1]), form.value.dtype)
