"""The affine update on GPUs: Triton programs that carry a tile of a matrix in registers.

Only what depends on the matrix runs chunk by chunk: forward, the matrices that chunks start from
and what chunks write; backward, their cotangents. Products over all chunks at once do the rest. The
columns of a matrix are independent, so each program carries a few of them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from memcache_jax._typing import Array
from memcache_jax.kernels._shapes import cut, pad_to, power_of_two
from memcache_jax.kernels._triton import for_each, triton_call, with_most_stages
from memcache_jax.kernels.affine_update._shared import Backend, by_kernels
from memcache_jax.kernels.affine_update.form import AffineChunk


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a program runs.

    Attributes:
      columns: columns of a matrix that it carries, a power of two.
      num_warps: its warps.
      num_stages: loads in flight, at most.
    """

    columns: int
    num_warps: int
    num_stages: int


_product = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def affine_update(
    chunk: Callable[[Any], AffineChunk],
    state: Array | None,
    rows: Any,
    batch_dims: int,
    keep: int,
) -> tuple[Array, Array]:
    """See ``api.affine_update``."""
    backend = Backend("pallas_gpu", Blocks, plan, forward, backward)
    return by_kernels(backend, chunk, state, rows, batch_dims, keep)


def plan(form: AffineChunk, state: jax.ShapeDtypeStruct, keep: int, blocks: Blocks) -> Blocks:
    """Returns the block sizes with as many loads in flight as fit, or refuses."""
    del state, keep
    return with_most_stages("affine_update", blocks, functools.partial(_shared_bytes, form))


def _shared_bytes(form: AffineChunk, blocks: Blocks) -> int:
    """Estimates the shared memory of the backward pass, which needs more than the forward one.

    The estimate is what Triton asks for on an H100, or up to a tenth more: every load in flight but
    the last, and one operand of a product, on its way to the matrix units.
    """
    rows, keys, writes, values = _sizes(form)
    tile = min(blocks.columns, values)
    operands = {"key": writes * keys, "query": rows * keys}
    if form.erase is not None:
        operands["erase"] = writes * keys
    tiles = [size * tile for size in (rows, keys, writes)]
    if blocks.num_stages == 1:
        return 4 * max(*operands.values(), *tiles)
    loads = sum(operands.values()) + sum(tiles)
    return 4 * ((blocks.num_stages - 1) * loads + max(tiles))


def forward(form: AffineChunk, state: Array, keep: int, blocks: Blocks) -> tuple[Array, Array, Any]:
    """Returns matrices after every ``keep`` chunks, the outputs, and what ``backward`` needs."""
    full = _filled(form)
    starts, written, end = _starts(full, _matrices(state), blocks)
    y = _dot("ucmk,uckv->ucmv", full.query, starts) + _dot("ucmw,ucwv->ucmv", full.scores, written)
    ends = jnp.concatenate([starts[:, keep::keep], end[:, None]], axis=1)
    y = y[:, :, : form.query.shape[2], : form.value.shape[3]]
    return ends[..., : state.shape[1], : state.shape[2]], y.astype(form.value.dtype), state


def backward(
    form: AffineChunk, state: Array, d_ends: Array, d_y: Array, blocks: Blocks
) -> tuple[AffineChunk, Array]:
    """Returns the cotangents of the form and of the first matrix."""
    full = _filled(form)
    d_y = pad_to(d_y.astype(jnp.float32), (full.query.shape[2], full.value.shape[3]))
    starts, written, _ = _starts(full, _matrices(state), blocks)
    d_afters, d_written, d_state = _d_afters(full, _matrices(d_ends), d_y, blocks)
    d_form = AffineChunk(
        decay=jnp.sum(d_afters * starts, axis=-1),
        value=d_written,
        key=_dot("ucwv,uckv->ucwk", written, d_afters),
        query=_dot("ucmv,uckv->ucmk", d_y, starts),
        scores=_dot("ucmv,ucwv->ucmw", d_y, written),
        erase=None if form.erase is None else -_dot("ucwv,uckv->ucwk", d_written, starts),
    )
    return jax.tree.map(cut, d_form, form), cut(d_state, state)


def _filled(form: AffineChunk) -> AffineChunk:
    """The maps in float32, padded to powers of two and to as many erasures as writes."""
    rows, keys, writes, values = _sizes(form)
    shapes = dict(
        decay=(keys,),
        value=(writes, values),
        key=(writes, keys),
        query=(rows, keys),
        scores=(rows, writes),
        erase=(writes, keys),
    )
    arrays = {name: x for name, x in form._asdict().items() if x is not None}
    return AffineChunk(
        **{name: pad_to(x.astype(jnp.float32), shapes[name]) for name, x in arrays.items()}
    )


def _sizes(form: AffineChunk) -> tuple[int, ...]:
    """Rows, keys, writes and values of a chunk, padded."""
    rows, keys, writes, values = *form.query.shape[2:], *form.value.shape[2:]
    return tuple(map(power_of_two, (rows, keys, writes, values)))


def _matrices(x: Array) -> Array:
    return pad_to(x.astype(jnp.float32), [power_of_two(size) for size in x.shape[-2:]])


def _starts(form: AffineChunk, state: Array, blocks: Blocks) -> tuple[Array, Array, Array]:
    """The matrices that chunks start from, what chunks write, and the last matrix."""

    def kernel(state_ref, value_ref, decay_ref, key_ref, *refs):
        *erase_ref, starts_ref, written_ref, end_ref = refs

        def chunk(c: Array, matrix: Array) -> Array:
            starts_ref[0, c] = matrix
            written = value_ref[0, c]
            if erase_ref:
                written -= _product(erase_ref[0][0, c], matrix)
            written_ref[0, c] = written
            decay = decay_ref[0, c]
            return decay[:, None] * matrix + _product(key_ref[0, c].T, written)

        end_ref[0] = for_each(form.decay.shape[1], chunk, state_ref[0])

    starts = (*form.key.shape[:2], *state.shape[1:])
    return _call(
        "affine_update_forward",
        kernel,
        blocks,
        tiled=(state, form.value),
        whole=(form.decay, form.key, *([] if form.erase is None else [form.erase])),
        outputs=(starts, form.value.shape, state.shape),
    )


def _d_afters(
    form: AffineChunk, d_ends: Array, d_y: Array, blocks: Blocks
) -> tuple[Array, Array, Array]:
    """Cotangents of the matrices after chunks, of what chunks write, and of the first matrix."""
    chunks = form.decay.shape[1]
    keep = np.int32(chunks // d_ends.shape[1])
    from_y = _dot("ucmw,ucmv->ucwv", form.scores, d_y)

    def kernel(d_end_ref, from_y_ref, d_y_ref, decay_ref, key_ref, query_ref, *refs):
        *erase_ref, d_afters_ref, d_written_ref, d_state_ref = refs

        def chunk(i: Array, d_after: Array) -> Array:
            c = chunks - 1 - i
            returned = lax.rem(i, keep) == 0
            d_after += jnp.where(returned, d_end_ref[0, lax.div(c, keep)], 0.0)
            d_afters_ref[0, c] = d_after
            d_written = from_y_ref[0, c] + _product(key_ref[0, c], d_after)
            d_written_ref[0, c] = d_written
            d_matrix = decay_ref[0, c][:, None] * d_after
            d_matrix += _product(query_ref[0, c].T, d_y_ref[0, c])
            if erase_ref:
                d_matrix -= _product(erase_ref[0][0, c].T, d_written)
            return d_matrix

        zero = jnp.zeros(d_state_ref.shape[1:], jnp.float32)
        d_state_ref[0] = for_each(chunks, chunk, zero)

    starts = (*form.key.shape[:2], *d_ends.shape[2:])
    return _call(
        "affine_update_backward",
        kernel,
        blocks,
        tiled=(d_ends, from_y, d_y),
        whole=(form.decay, form.key, form.query, *([] if form.erase is None else [form.erase])),
        outputs=(starts, form.value.shape, (starts[0], *starts[2:])),
    )


def _call(
    name: str,
    kernel: Callable[..., None],
    blocks: Blocks,
    *,
    tiled: Sequence[Array],
    whole: Sequence[Array],
    outputs: Sequence[tuple[int, ...]],
) -> Any:
    """Runs one program for each matrix and each tile of its columns.

    Args:
      name: the kernel's name.
      kernel: works on one tile of the arrays.
      blocks: how many columns a tile has.
      tiled: arrays (units, ..., columns).
      whole: arrays (units, ...).
      outputs: shapes (units, ..., columns).
    """
    units, columns = outputs[0][0], outputs[0][-1]
    tile = min(columns, blocks.columns)

    def of_columns(shape: tuple[int, ...]) -> pl.BlockSpec:
        middle = shape[1:-1]
        return pl.BlockSpec((1, *middle, tile), lambda u, t: (u, *[0] * len(middle), t))

    def of_all(shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec((1, *shape[1:]), lambda u, t: (u, *[0] * len(shape[1:])))

    return triton_call(
        kernel,
        grid=(units, columns // tile),
        in_specs=[*(of_columns(x.shape) for x in tiled), *(of_all(x.shape) for x in whole)],
        out_specs=[of_columns(shape) for shape in outputs],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in outputs],
        name=name,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )(*tiled, *whole)
