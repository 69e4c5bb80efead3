"""The grouped read on a GPU, by Triton: one program per block of rows, or per state.

For the gradient of a state, a program loops over its consecutive blocks. Arrays are padded with
zeros to powers of two, which must not change the values that ``read`` returns.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from memcache_jax._typing import Array, Float, Int, Matrices
from memcache_jax.kernels._block_sizes import block_sizes
from memcache_jax.kernels._dispatch import check_served
from memcache_jax.kernels._shapes import (
    dtype_reasons,
    pad_to,
    power_of_two,
    read_shape,
    shape_key,
)
from memcache_jax.kernels._triton import TritonSizes, triton_state_reasons
from memcache_jax.kernels.grouped_read._blocks import by_kernels


def grouped_read(
    read: Callable[..., Array],
    bank: Matrices,
    query: Float[Array, "b h n c k"],
    gates: Float[Array, "b h n c s"],
    states: Int[Array, "b h n c s"],
) -> Float[Array, "b h n c v"]:
    """See ``api.grouped_read``."""
    check_served(
        "grouped_read",
        "pallas_gpu",
        [*dtype_reasons(*bank, query, gates), *triton_state_reasons(bank)],
    )
    row = read_shape(read, bank, query)
    sizes = block_sizes(
        TritonSizes, "grouped_read/pallas_gpu", shape_key(bank, query.shape[3]), query.dtype
    )
    pairs = states.shape[2] * states.shape[3] * states.shape[4]
    y = by_kernels(
        lambda _: _Kernels(read, sizes),
        min(sizes.rows, power_of_two(-(-pairs // bank[0].shape[2]))),
        tuple(pad_to(m, tuple(map(power_of_two, m.shape[3:]))) for m in bank),
        pad_to(query, (power_of_two(query.shape[-1]),)),
        gates,
        states,
    )
    return y[..., : row.shape[-1]].astype(row.dtype)


@dataclasses.dataclass(frozen=True)
class _Kernels:
    """The kernels of one read.

    Attributes:
      read: as in ``api.grouped_read``.
      sizes: how programs run.
    """

    read: Callable[..., Array]
    sizes: TritonSizes

    def forward(self, state: Array, bank: Matrices, rows: Array, weights: Array) -> Array:
        def kernel(state, *refs):
            *bank, rows, weights, y = refs
            unit, block = pl.program_id(0), pl.program_id(1)
            matrices = tuple(m[unit, state[unit, block]] for m in bank)
            y[unit, block] = self.read(matrices, rows[unit, block], weights[unit, block])

        row = read_shape(self.read, bank, rows, lead=1)
        shape = jax.ShapeDtypeStruct((*rows.shape[:3], row.shape[-1]), row.dtype)
        return self.sizes.call("grouped_read_forward", kernel, state.shape, shape)(
            state, *bank, rows, weights
        )

    def backward(
        self, state: Array, bank: Matrices, rows: Array, weights: Array, cotangent: Array
    ) -> tuple[Sequence[Array], Array, Array]:
        def of_rows(state, *refs):
            *bank, rows, weights, cotangent, d_rows, d_weights = refs
            unit, block = here = pl.program_id(0), pl.program_id(1)
            matrices = tuple(m[unit, state[unit, block]] for m in bank)
            _, pull = jax.vjp(lambda x, w: self.read(matrices, x, w), rows[here], weights[here])
            d_rows[here], d_weights[here] = pull(cotangent[here])

        def of_bank(first, *refs):
            (*bank_refs, rows, weights, cotangent), d_bank = refs[: -len(bank)], refs[-len(bank) :]
            unit, state = pl.program_id(0), pl.program_id(1)
            matrices = tuple(m[unit, state] for m in bank_refs)

            def add(block, totals):
                x, weight = rows[unit, block], weights[unit, block]
                _, pull = jax.vjp(lambda matrices: self.read(matrices, x, weight), matrices)
                changes = (d.astype(jnp.float32) for d in pull(cotangent[unit, block])[0])
                return tuple(t + change for t, change in zip(totals, changes, strict=True))

            zeros = tuple(jnp.zeros(m.shape, jnp.float32) for m in matrices)
            totals = lax.fori_loop(first[unit, state], first[unit, state + 1], add, zeros)
            for ref, total in zip(d_bank, totals, strict=True):
                ref[unit, state] = total.astype(ref.dtype)

        units, num_states = bank[0].shape[:2]
        places = jnp.arange(num_states + 1)
        first = jax.vmap(lambda state: jnp.searchsorted(state, places))(state).astype(jnp.int32)
        arrays = (*bank, rows, weights, cotangent)
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (rows, weights)]
        d_rows, d_weights = self.sizes.call(
            "grouped_read_backward_rows", of_rows, state.shape, shapes
        )(state, *arrays)
        shapes = [jax.ShapeDtypeStruct(m.shape, m.dtype) for m in bank]
        d_bank = self.sizes.call(
            "grouped_read_backward_bank", of_bank, (units, num_states), shapes
        )(first, *arrays)
        return d_bank, d_rows, d_weights
