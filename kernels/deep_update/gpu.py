"""The deep update on GPUs: Triton programs carry memories from chunk to chunk.

They compute the states that chunks start from and, backward, the cotangents of these. Products over
all chunks at once do the rest.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from memcache_jax._typing import Array, Bool, Float
from memcache_jax.kernels._block_sizes import block_sizes
from memcache_jax.kernels._dispatch import check_served
from memcache_jax.kernels._shapes import cut, dtype_reasons, pad_to, power_of_two
from memcache_jax.kernels._triton import with_most_stages
from memcache_jax.kernels.deep_update._carry import Blocks, d_starts_of, starts_of
from memcache_jax.kernels.deep_update.form import DescentChunk, Loss, Parts


def deep_update(
    form: DescentChunk, given: Parts, goes_on: Float[Array, "units chunks"], loss: Loss
) -> Parts:
    """See ``api.deep_update``."""
    check_served("deep_update", "pallas_gpu", dtype_reasons(*jax.tree.leaves((form, given))))
    shapes = "+".join("x".join(map(str, x.shape[2:])) for x in jax.tree.leaves(given))
    key = f"n{form.key.shape[1]} m{form.key.shape[2]} {shapes}"
    blocks = block_sizes(Blocks, "deep_update/pallas_gpu", key, form.key.dtype)
    blocks = plan(form, given, blocks)

    @jax.custom_vjp
    def update(form: DescentChunk, given: Parts, goes_on: Array) -> Parts:
        return forward(form, given, goes_on)[0]

    def forward(form: DescentChunk, given: Parts, goes_on: Array) -> tuple[Parts, Any]:
        starts = starts_of(_form(form), goes_on, _filled(given), loss, blocks)
        starts = jax.tree.map(cut, starts, given)
        return starts, (form, starts, goes_on)

    def backward(residuals: Any, d_starts: Parts) -> tuple[DescentChunk, Parts, Array]:
        form, starts, goes_on = residuals
        weights, d_starts = _filled((starts[0], d_starts))
        d_starts = d_starts_of(_form(form), goes_on, weights, d_starts, loss, blocks)
        d_starts = jax.tree.map(cut, d_starts, starts)

        def ends(form: DescentChunk) -> Parts:
            before = jax.tree.map(lambda x: x[:, :-1], (form, starts))
            return jax.vmap(jax.vmap(lambda form, start: form.end(start, loss)))(*before)

        d_ends = jax.tree.map(lambda x: _where(goes_on[:, 1:] > 0, x[:, 1:]), d_starts)
        (d_form,) = jax.vjp(ends, form)[1](d_ends)
        d_given = jax.tree.map(lambda x: _where(goes_on == 0, x), d_starts)
        return d_form, d_given, jnp.zeros_like(goes_on)

    update.defvjp(forward, backward)
    return update(form, given, goes_on)


def plan(form: DescentChunk, given: tuple, blocks: Blocks) -> Blocks:
    """Returns the block sizes with as many loads in flight as fit, or refuses."""
    return with_most_stages("deep_update", blocks, functools.partial(_shared_bytes, form, given))


def _shared_bytes(form: DescentChunk, given: tuple, blocks: Blocks) -> int:
    """Estimates the most shared memory that a pass needs.

    For the backward pass of chunks of 64 at depth 2 the estimate is what Triton asks for on an
    H200, or up to a half more: one operand of a product, on its way to the matrix units, or all
    loads in flight of the longest loop.
    """
    rows, keys, values, units = map(
        power_of_two, (*form.key.shape[2:], form.value.shape[3], given[0][-1].shape[2])
    )
    wide, tile = max(keys, values), min(blocks.units, units)
    if blocks.num_stages == 1:
        return 4 * (rows * wide + 2 * wide * tile)
    matrices = 3 + len(given)
    loads = (3 * rows + matrices * tile) * wide + rows * (2 * tile + len(given))
    return 4 * (blocks.num_stages - 1) * loads


def _form(form: DescentChunk) -> DescentChunk:
    """The chunks in float32, padded to powers of two."""
    key, value = _filled((form.key, form.value))
    mixing = pad_to(form.mixing.astype(jnp.float32), (form.mixing.shape[2], key.shape[2]))
    return DescentChunk(key, value, form.decay.astype(jnp.float32), mixing)


def _filled(tree: Any) -> Any:
    """Arrays (units, chunks, rows, columns) in float32, padded to powers of two."""

    def filled(x: Array) -> Array:
        return pad_to(x.astype(jnp.float32), tuple(map(power_of_two, x.shape[2:])))

    return jax.tree.map(filled, tree)


def _where(condition: Bool[Array, "units chunks"], x: Array) -> Array:
    """Returns x where the condition holds, and zero elsewhere."""
    return jnp.where(condition.reshape(*condition.shape, *[1] * (x.ndim - 2)), x, 0)
