"""The gated bank read on a GPU, by Triton: one program per tile of rows, or per state.

For the forward pass, and for the gradients of rows and gates, a program loops over the states that
its block reads. For the gradient of a state it loops over the blocks that read the state. Arrays
are padded with zeros to powers of two, which must not change the values that ``read`` returns.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from memcache_jax._typing import Array, Float, Matrices
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
from memcache_jax.kernels.bank_read._shared import (
    Runs,
    differentiable,
    make_runs,
    plan_reasons,
    unpack,
)


def bank_read(
    read: Callable[..., Array],
    bank: Matrices,
    query: Float[Array, "b h n c k"],
    gates: Float[Array, "b h n c r"],
    reads: np.ndarray | Array,
) -> Float[Array, "b h n c v"]:
    """See ``api.bank_read``."""
    batch, heads, _, rows, features = query.shape
    states, row = bank[0].shape[2], read_shape(read, bank, query)
    if not reads.shape[-1]:
        return jnp.zeros((*query.shape[:4], row.shape[-1]), row.dtype)
    check_served(
        "bank_read",
        "pallas_gpu",
        [
            *dtype_reasons(*bank, query, gates),
            *plan_reasons(reads, states, states),
            *triton_state_reasons(bank),
        ],
    )
    sizes = block_sizes(TritonSizes, "bank_read/pallas_gpu", shape_key(bank, rows), query.dtype)
    tile = min(sizes.rows, power_of_two(rows))
    full = -(-rows // tile) * tile

    def by_unit(x: Array, *last: int) -> Array:
        return pad_to(x.reshape(batch * heads, *x.shape[2:]), last)

    visible = jnp.asarray(reads >= 0).reshape(-1, 1, reads.shape[-2], 1, reads.shape[-1])
    weights = jnp.swapaxes(jnp.where(visible, gates, 0), 3, 4)
    kernels = _Kernels(read, tile, heads if reads.ndim == 3 else batch * heads, states, sizes)
    y = differentiable(
        kernels
    )(
        (
            make_runs(reads, states, states, by_chunk=False),  # a run for each block
            make_runs(reads, states, 1, by_chunk=True),
        ),
        tuple(by_unit(m, *map(power_of_two, m.shape[3:])) for m in bank),
        by_unit(query, full, power_of_two(features)),
        by_unit(weights, full),
    )
    return y.reshape(batch, heads, *y.shape[1:])[:, :, :, :rows, : row.shape[-1]]


@dataclasses.dataclass(frozen=True)
class _Kernels:
    """The kernels of one read.

    Attributes:
      read: as in ``api.bank_read``.
      tile: rows that are read at once.
      units_per_list: consecutive units that share one list of runs.
      states: number of states in a bank.
      sizes: how programs run.
    """

    read: Callable[..., Array]
    tile: int
    units_per_list: int
    states: int
    sizes: TritonSizes

    def forward(self, runs: Runs, bank: Matrices, query: Array, weights: Array) -> Array:
        row = read_shape(self.read, bank, query, lead=1)

        def kernel(begin, pairs, *refs):
            *bank, query, weights, y = refs
            unit, block, here = self._rows()
            x = query[unit, block, here, :]

            def add(pair, total):
                state, slot = unpack(pair)
                matrices = tuple(m[unit, state] for m in bank)
                weight = weights[unit, block, slot, here]
                return total + self.read(matrices, x, weight).astype(jnp.float32)

            zeros = jnp.zeros((self.tile, row.shape[-1]), jnp.float32)
            total = self._over_run(self._chosen(unit), block, begin, pairs, add, zeros)
            y[unit, block, here, :] = total.astype(y.dtype)

        shape = jax.ShapeDtypeStruct((*query.shape[:3], row.shape[-1]), row.dtype)
        lists = self._lists(query, runs.begin, runs.pairs)
        return self.sizes.call("bank_read_forward", kernel, self._row_grid(query), shape)(
            *lists, *bank, query, weights
        )

    def backward_rows(self, runs: Runs, arrays: tuple, cotangent: Array) -> Sequence[Array]:
        bank, query, weights = arrays

        def kernel(begin, pairs, *refs):
            *bank, query, weights, cotangent, d_query, d_weights = refs
            unit, block, here = self._rows()
            x, d_y = query[unit, block, here, :], cotangent[unit, block, here, :]

            def add(pair, total):
                state, slot = unpack(pair)
                matrices = tuple(m[unit, state] for m in bank)
                weight = weights[unit, block, slot, here]
                _, pull = jax.vjp(lambda x, w: self.read(matrices, x, w), x, weight)
                d_x, d_weight = pull(d_y)
                d_weights[unit, block, slot, here] = d_weight
                return total + d_x.astype(jnp.float32)

            zeros = jnp.zeros(x.shape, jnp.float32)
            total = self._over_run(self._chosen(unit), block, begin, pairs, add, zeros)
            d_query[unit, block, here, :] = total.astype(d_query.dtype)

        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, weights)]
        lists = self._lists(query, runs.begin, runs.pairs)
        return self.sizes.call("bank_read_backward_rows", kernel, self._row_grid(query), shapes)(
            *lists, *bank, query, weights, cotangent
        )

    def backward_bank(self, runs: Runs, arrays: tuple, cotangent: Array) -> Sequence[Array]:
        bank, query, weights = arrays
        tiles = query.shape[2] // self.tile

        def kernel(first, block, begin, pairs, *refs):
            totals = refs[-len(bank) :]
            *bank_refs, query, weights, cotangent = refs[: -len(bank)]
            unit, state = pl.program_id(0), pl.program_id(1)
            chosen = self._chosen(unit)
            matrices = tuple(m[unit, state] for m in bank_refs)

            def visit(i, totals):
                run, tile = lax.div(i, np.int32(tiles)), lax.rem(i, np.int32(tiles))
                here, place = pl.ds(tile * self.tile, self.tile), block[chosen, run]
                x, d_y = query[unit, place, here, :], cotangent[unit, place, here, :]

                def add(pair, totals):
                    weight = weights[unit, place, unpack(pair)[1], here]
                    _, pull = jax.vjp(lambda matrices: self.read(matrices, x, weight), matrices)
                    changes = (change.astype(jnp.float32) for change in pull(d_y)[0])
                    return tuple(t + change for t, change in zip(totals, changes, strict=True))

                return self._over_run(chosen, run, begin, pairs, add, totals)

            ends = (first[chosen, state] * tiles, first[chosen, state + 1] * tiles)
            zeros = tuple(jnp.zeros(m.shape, jnp.float32) for m in matrices)
            for ref, total in zip(totals, lax.fori_loop(*ends, visit, zeros), strict=True):
                ref[unit, state] = total.astype(ref.dtype)

        chunk, *lists = self._lists(query, runs.chunk, runs.block, runs.begin, runs.pairs)
        first = jax.vmap(lambda chunk: jnp.searchsorted(chunk, jnp.arange(self.states + 1)))(chunk)
        shapes = [jax.ShapeDtypeStruct(m.shape, m.dtype) for m in bank]
        return self.sizes.call(
            "bank_read_backward_bank", kernel, (len(query), self.states), shapes
        )(first.astype(jnp.int32), *lists, *bank, query, weights, cotangent)

    def _lists(self, query: Array, *lists: Any) -> list[Array]:
        """The lists, one row for all units that share it."""
        return [jnp.asarray(x).reshape(len(query) // self.units_per_list, -1) for x in lists]

    def _row_grid(self, query: Array) -> tuple[int, ...]:
        units, blocks, rows, _ = query.shape
        return units, blocks, rows // self.tile

    def _rows(self) -> tuple:
        """The unit, the block and the rows of a program."""
        return pl.program_id(0), pl.program_id(1), pl.ds(pl.program_id(2) * self.tile, self.tile)

    def _chosen(self, unit: Any) -> Any:
        return lax.div(unit, np.int32(self.units_per_list))

    def _over_run(
        self, chosen: Any, run: Any, begin: Any, pairs: Any, add: Callable, totals: Any
    ) -> Any:
        """Folds ``add`` over the pairs of a run."""

        def visit(i, totals):
            pair = pairs[chosen, i]
            return lax.cond(pair >= 0, lambda: add(pair, totals), lambda: totals)

        return lax.fori_loop(begin[chosen, run], begin[chosen, run + 1], visit, totals)
