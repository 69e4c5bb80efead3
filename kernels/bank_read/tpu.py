"""The gated bank read on a TPU: chunks of the bank in vector memory, visited block by block.

A run is what one block reads of one chunk of states. The chunk is brought into memory once, and the
run's pairs are read from it one after the other; a bank that fits into memory is one chunk. The
backward pass recomputes the reads. It visits the same runs for the gradients of rows and gates, and
the runs sorted by chunk for those of states. All arithmetic is float32, with products as exact as
the caller's ``jax.default_matmul_precision``.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memcache_jax._typing import Array, Float, Matrices
from memcache_jax.kernels._block_sizes import block_sizes
from memcache_jax.kernels._dispatch import check_served
from memcache_jax.kernels._shapes import dtype_reasons, pad_to, read_shape, shape_key
from memcache_jax.kernels._tpu import LANES, smem_reason, tile_bytes, tpu_call, vmem_reason
from memcache_jax.kernels.bank_read._shared import (
    Runs,
    differentiable,
    make_runs,
    plan_reasons,
    unpack,
)


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """What one step of the kernels holds.

    Attributes:
      rows: rows of a block that are read at once.
      bank_bytes: the most bytes of states in memory at once, unless a single state has more.
    """

    rows: int
    bank_bytes: int


def bank_read(
    read: Callable[..., Array],
    bank: Matrices,
    query: Float[Array, "b h n c k"],
    gates: Float[Array, "b h n c r"],
    reads: np.ndarray | Array,
) -> Float[Array, "b h n c v"]:
    """See ``api.bank_read``."""
    batch, heads, _, rows, features = query.shape
    slots, states = gates.shape[4], bank[0].shape[2]
    shapes = [matrix.shape[3:] for matrix in bank]
    row = read_shape(read, bank, query)
    sizes = block_sizes(BlockSizes, "bank_read/pallas_tpu", shape_key(bank, rows), query.dtype)
    tiles = -(-rows // sizes.rows)
    tile = rows if tiles == 1 else -(-rows // (tiles * LANES)) * LANES
    state_bytes = sum(map(tile_bytes, shapes))
    chunk = max(1, min(states, sizes.bank_bytes // state_bytes))
    # Blocks are double-buffered; so are the gradients of a chunk.
    widest = max(features, *(max(shape) for shape in shapes))
    vmem = 4 * chunk * state_bytes + 4 * tile_bytes((slots, tile)) + 12 * tile_bytes((tile, widest))
    check_served(
        "bank_read",
        "pallas_tpu",
        [
            *dtype_reasons(*bank, query, gates),
            *plan_reasons(reads, states, chunk),
            vmem_reason(("any pass", vmem)),
        ],
    )
    if not slots:
        return jnp.zeros((*query.shape[:4], row.shape[-1]), row.dtype)

    by_block, by_chunk = (
        make_runs(reads, states, chunk, by_chunk=by_chunk) for by_chunk in (False, True)
    )
    numbers = max(sum(x.size for x in runs) for runs in (by_block, by_chunk))
    check_served("bank_read", "pallas_tpu", [smem_reason(numbers)])

    def by_unit(x: Array) -> Array:
        return x.reshape(batch * heads, *x.shape[2:])

    kernels = _Kernels(
        read, tile, chunk, heads if reads.ndim == 3 else batch * heads, row.shape[-1], vmem
    )
    # In float32, whose rows can be loaded one at a time.
    weights = jnp.swapaxes(gates, 3, 4).astype(jnp.float32)
    y = differentiable(kernels)(
        (by_block, by_chunk),
        tuple(map(by_unit, bank)),
        by_unit(pad_to(query, (tiles * tile, features))),
        by_unit(pad_to(weights, (slots, tiles * tile))),
    )
    return y.reshape(batch, heads, *y.shape[1:])[:, :, :, :rows].astype(row.dtype)


@dataclasses.dataclass(frozen=True)
class _Kernels:
    """The kernels of one read.

    Attributes:
      read: as in ``api.bank_read``.
      tile: rows that are read at once.
      chunk: states that are in memory at once.
      units_per_list: consecutive units that share one list of runs.
      out_features: width of what is read.
      vmem: bytes of vector memory.
    """

    read: Callable[..., Array]
    tile: int
    chunk: int
    units_per_list: int
    out_features: int
    vmem: int

    def forward(self, runs: Runs, bank: Matrices, query: Array, weights: Array) -> Array:
        def add(pair, outputs, state, slot):
            del state, slot
            outputs[0][0, 0] += self.read(*pair)

        outputs = ((*query.shape[:3], self.out_features),)
        return self._visit("forward", add, runs, (bank, query, weights), outputs, "r")[0]

    def backward_rows(self, runs: Runs, arrays: tuple, cotangent: Array) -> Sequence[Array]:
        def add(pair, outputs, state, slot):
            del state
            matrices, x, weight, cotangent = pair
            _, pull = jax.vjp(lambda x, weight: self.read(matrices, x, weight), x, weight)
            d_x, d_weight = pull(cotangent)
            outputs[0][0, 0] += d_x
            outputs[1][0, 0, pl.ds(slot, 1), :] = d_weight.reshape(1, -1)

        outputs = (arrays[1].shape, arrays[2].shape)
        return self._visit("backward_rows", add, runs, (*arrays, cotangent), outputs, "rg")

    def backward_bank(self, runs: Runs, arrays: tuple, cotangent: Array) -> Sequence[Array]:
        def add(pair, outputs, state, slot):
            del slot
            matrices, x, weight, cotangent = pair
            _, pull = jax.vjp(lambda matrices: self.read(matrices, x, weight), matrices)
            for total, change in zip(outputs, pull(cotangent)[0], strict=True):
                total[0, state] += change

        outputs = tuple(matrix.shape for matrix in arrays[0])
        return self._visit(
            "backward_bank", add, runs, (*arrays, cotangent), outputs, "b" * len(outputs)
        )

    def _visit(
        self,
        name: str,
        add: Callable[..., None],
        runs: Runs,
        arrays: tuple,
        outputs: Sequence[tuple[int, ...]],
        kinds: str,
    ) -> Sequence[Array]:
        """Calls ``add`` for every pair of every unit, on outputs that start at zero.

        Args:
          name: of the kernel.
          add: (operands, outputs, state in the chunk, slot) -> None. A pair's operands are its
            matrices, rows and gates, and its rows of the cotangent if there is one.
          runs: by chunk for gradients of states (row tiles then vary fastest), else by block.
          arrays: bank, query, gates and maybe a cotangent, all (units, ...).
          outputs: shapes of the outputs.
          kinds: what each one is: "r" rows, "g" gates, "b" a matrix of the bank.
        """
        bank, query, weights, *cotangent = arrays
        units, tiles = len(query), query.shape[2] // self.tile
        num_lists = units // self.units_per_list
        num_runs, num_pairs = (len(x) // num_lists for x in (runs.block, runs.pairs))
        of_bank = kinds[0] == "b"
        grid = (units, num_runs, tiles) if of_bank else (units, tiles, num_runs)
        run_axis, tile_axis = (1, 2) if of_bank else (2, 1)

        def list_of(unit: Any) -> Any:
            return lax.div(unit, np.int32(self.units_per_list))

        def spec(shape: tuple[int, ...], kind: str) -> pl.BlockSpec:
            def index(*ids_and_lists):
                *ids, block, chunk, _, _ = ids_and_lists
                place = list_of(ids[0]) * num_runs + ids[run_axis]
                if kind == "b":
                    return ids[0], chunk[place], 0, 0
                tile = ids[tile_axis]
                return ids[0], block[place], *((tile, 0) if kind == "r" else (0, tile))

            block_shape = {
                "r": (1, 1, self.tile, shape[-1]),
                "g": (1, 1, shape[2], self.tile),
                "b": (1, self.chunk, *shape[2:]),
            }
            return pl.BlockSpec(block_shape[kind], index)

        def kernel(block, chunk, begin, pairs, *refs):
            inputs, totals = refs[: -len(outputs)], refs[-len(outputs) :]
            *bank_refs, gate = inputs[: len(bank)] + inputs[len(bank) + 1 : len(bank) + 2]
            row_refs = inputs[len(bank) : len(bank) + 1] + inputs[len(bank) + 2 :]
            run, chosen = pl.program_id(run_axis), list_of(pl.program_id(0))
            major, place = chunk if of_bank else block, chosen * num_runs + run
            begins = (run == 0) | (major[place] != major[jnp.maximum(place - 1, 0)])
            if of_bank:
                begins &= pl.program_id(tile_axis) == 0

            @pl.when(begins)
            def _():
                for total in totals:
                    total[...] = jnp.zeros_like(total)

            def visit(i, _):
                packed = pairs[chosen * num_pairs + i]

                @pl.when(packed >= 0)
                def _():
                    state, slot = unpack(packed)
                    matrices = tuple(m[0, state].astype(jnp.float32) for m in bank_refs)
                    x, *more = (ref[0, 0].astype(jnp.float32) for ref in row_refs)
                    weight = gate[0, 0, pl.ds(slot, 1), :].reshape(-1)
                    add((matrices, x, weight, *more), totals, state, slot)

            first = chosen * (num_runs + 1) + run
            lax.fori_loop(begin[first], begin[first + 1], visit, None)

        in_kinds = "b" * len(bank) + "rg" + "r" * len(cotangent)
        operands = (*bank, query, weights, *cotangent)
        return tpu_call(
            kernel,
            name=f"bank_read_{name}",
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(Runs._fields),
                grid=grid,
                in_specs=[spec(x.shape, kind) for x, kind in zip(operands, in_kinds, strict=True)],
                out_specs=[spec(shape, kind) for shape, kind in zip(outputs, kinds, strict=True)],
            ),
            out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in outputs],
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_bytes=self.vmem,
        )(*map(jnp.asarray, runs), *operands)
