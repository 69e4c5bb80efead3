"""The gated bank read on a TPU: chunks of the bank in vector memory, visited block by block.

A run is what one block reads of one chunk of states. The chunk is brought into memory once, and the
run's pairs are read from it one after the other; a bank that fits into memory is one chunk. If the
banks of several heads fit, one program reads them all, and tokens keep the model's layout. The
backward pass recomputes the reads. It visits the same runs for the gradients of rows and gates, and
the runs sorted by chunk for those of states. Rows are read and written in the query's dtype; all
arithmetic is float32, with products as exact as the caller's ``jax.default_matmul_precision``.
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
from memcache_jax.kernels._tpu import (
    LANES,
    smem_reason,
    tile_bytes,
    tpu_call,
    vmem_left,
    vmem_reason,
)
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
    batch, heads, _, rows, _ = query.shape
    slots, states = gates.shape[4], bank[0].shape[2]
    row = read_shape(read, bank, query)
    sizes = block_sizes(BlockSizes, "bank_read/pallas_tpu", shape_key(bank, rows), query.dtype)
    tiles, tile = _tiles(rows, sizes)
    together, chunk, vmem = _plan(bank, query, slots, tile, sizes.bank_bytes)
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
        return jnp.zeros((*query.shape[:4], row.shape[-1]), query.dtype)

    by_block, by_chunk = (
        make_runs(reads, states, chunk, by_chunk=by_chunk) for by_chunk in (False, True)
    )
    numbers = max(sum(x.size for x in runs) for runs in (by_block, by_chunk))
    check_served("bank_read", "pallas_tpu", [smem_reason(numbers)])

    def by_unit(x: Array) -> Array:
        return x.reshape(batch * heads, *x.shape[2:])

    inside = together > 1
    query = pad_to(query, (tiles * tile, query.shape[-1]))
    programs = (1 if reads.ndim == 3 else batch) * heads // together
    kernels = _Kernels(read, tile, chunk, together, inside, programs, row.shape[-1], vmem)
    # In float32, whose rows can be loaded one at a time.
    weights = jnp.swapaxes(gates, 3, 4).astype(jnp.float32)
    y = differentiable(kernels)(
        (by_block, by_chunk),
        # The order in which the kernels that write states leave them.
        tuple(jnp.moveaxis(matrix, 1, 2) for matrix in bank),
        jnp.moveaxis(query, 1, 3) if inside else by_unit(query),
        by_unit(pad_to(weights, (slots, tiles * tile))),
    )
    y = jnp.moveaxis(y, 3, 1) if inside else y.reshape(batch, heads, *y.shape[1:])
    return y[:, :, :, :rows]


def holds_all_states(bank: Matrices, query: Float[Array, "b h n c k"]) -> bool:
    """Whether kernels can hold all states of a head at once, each with a slot in every block."""
    rows, states = query.shape[3], bank[0].shape[2]
    sizes = block_sizes(BlockSizes, "bank_read/pallas_tpu", shape_key(bank, rows), query.dtype)
    _, chunk, vmem = _plan(bank, query, states, _tiles(rows, sizes)[1], sizes.bank_bytes)
    return chunk == states and vmem_left(vmem) > 0


def _tiles(rows: int, sizes: BlockSizes) -> tuple[int, int]:
    """The number of tiles that the rows of a block are cut into, and the rows of a tile."""
    tiles = -(-rows // sizes.rows)
    return tiles, rows if tiles == 1 else -(-rows // (tiles * LANES)) * LANES


def _plan(
    bank: Matrices, query: Array, slots: int, tile: int, bank_bytes: int
) -> tuple[int, int, int]:
    """Heads per program, states in memory at once, and bytes of vector memory.

    A program takes several heads, all or a multiple of 8, if their banks fit; it then reads tokens
    in the model's layout.
    """
    heads, states = query.shape[1], bank[0].shape[2]
    shapes = [matrix.shape[3:] for matrix in bank]
    state_bytes = sum(map(tile_bytes, shapes))
    # Blocks are double-buffered; so are the gradients of a chunk.
    widest = max(query.shape[-1], *(max(shape) for shape in shapes))
    of_head = 4 * tile_bytes((slots, tile)) + 12 * tile_bytes((tile, widest))
    parts = [size for size in range(heads, 1, -1) if heads % size == 0]
    for together in (size for size in parts if size in (heads, size // 8 * 8)):
        vmem = together * (4 * states * state_bytes + of_head)
        if vmem_left(vmem):
            return together, states, vmem
    most = min(bank_bytes, vmem_left(of_head) // 4)
    chunk = max(1, min(states, most // state_bytes))
    return 1, chunk, 4 * chunk * state_bytes + of_head


@dataclasses.dataclass(frozen=True)
class _Kernels:
    """The kernels of one read.

    Attributes:
      read: as in ``api.bank_read``.
      tile: rows that are read at once.
      chunk: states that are in memory at once.
      together: heads that one program reads.
      inside: whether rows are (b, n, c, h, k), not (units, n, c, k).
      programs_per_list: consecutive programs that share one list of runs.
      out_features: width of what is read.
      vmem: bytes of vector memory.
    """

    read: Callable[..., Array]
    tile: int
    chunk: int
    together: int
    inside: bool
    programs_per_list: int
    out_features: int
    vmem: int

    def forward(self, runs: Runs, bank: Matrices, query: Array, weights: Array) -> Array:
        def add(pair, outputs, head, state, slot):
            del state, slot
            outputs[0][head] += self.read(*pair)

        outputs = (jax.ShapeDtypeStruct((*query.shape[:-1], self.out_features), query.dtype),)
        return self._visit("forward", add, runs, (bank, query, weights), outputs, "r")[0]

    def backward_rows(self, runs: Runs, arrays: tuple, cotangent: Array) -> Sequence[Array]:
        def add(pair, outputs, head, state, slot):
            del state
            matrices, x, weight, cotangent = pair
            _, pull = jax.vjp(lambda x, weight: self.read(matrices, x, weight), x, weight)
            d_x, d_weight = pull(cotangent)
            outputs[0][head] += d_x
            outputs[1][head, 0, pl.ds(slot, 1), :] = d_weight.reshape(1, -1)

        return self._visit("backward_rows", add, runs, (*arrays, cotangent), arrays[1:], "rg")

    def backward_bank(self, runs: Runs, arrays: tuple, cotangent: Array) -> Sequence[Array]:
        def add(pair, outputs, head, state, slot):
            del slot
            matrices, x, weight, cotangent = pair
            _, pull = jax.vjp(lambda matrices: self.read(matrices, x, weight), matrices)
            for total, change in zip(outputs, pull(cotangent)[0], strict=True):
                total[0, state, head] += change

        outputs = tuple(jax.ShapeDtypeStruct(matrix.shape, jnp.float32) for matrix in arrays[0])
        return self._visit(
            "backward_bank", add, runs, (*arrays, cotangent), outputs, "b" * len(outputs)
        )

    def _visit(
        self,
        name: str,
        add: Callable[..., None],
        runs: Runs,
        arrays: tuple,
        outputs: Sequence[Any],
        kinds: str,
    ) -> Sequence[Array]:
        """Calls ``add`` for every pair of every unit, on outputs that start at zero.

        Args:
          name: of the kernel.
          add: (operands, outputs, head of the program, state in the chunk, slot) -> None. A pair's
            operands are its matrices, rows and gates, and its rows of the cotangent if there is
            one. Outputs of rows are (heads, rows, ...) in float32.
          runs: by chunk for gradients of states (row tiles then vary fastest), else by block.
          arrays: bank (b, states, h, in, out), query, gates and maybe a cotangent.
          outputs: shapes of the outputs.
          kinds: what each one is: "r" rows, "g" gates, "b" a matrix of the bank.
        """
        bank, query, weights, *cotangent = arrays
        programs, tiles = len(weights) // self.together, weights.shape[3] // self.tile
        num_lists = programs // self.programs_per_list
        parts = np.int32(bank[0].shape[2] // self.together)  # of the heads
        num_runs, num_pairs = (len(x) // num_lists for x in (runs.block, runs.pairs))
        of_bank = kinds[0] == "b"
        grid = (programs, num_runs, tiles) if of_bank else (programs, tiles, num_runs)
        run_axis, tile_axis = (1, 2) if of_bank else (2, 1)

        def list_of(program: Any) -> Any:
            return lax.div(program, np.int32(self.programs_per_list))

        def spec(shape: tuple[int, ...], kind: str) -> pl.BlockSpec:
            def index(*ids_and_lists):
                *ids, block, chunk, _, _ = ids_and_lists
                program, tile = ids[0], ids[tile_axis]
                place = list_of(program) * num_runs + ids[run_axis]
                if kind == "g":
                    return program, block[place], 0, tile
                if kind == "r" and not self.inside:
                    return program, block[place], tile, 0
                row, heads = lax.div(program, parts), lax.rem(program, parts)
                if kind == "b":
                    return row, chunk[place], heads, 0, 0
                return row, block[place], tile, heads, 0

            block_shape = {
                "r": (1, 1, self.tile, *[self.together] * self.inside, shape[-1]),
                "g": (self.together, 1, shape[2], self.tile),
                "b": (1, self.chunk, self.together, *shape[3:]),
            }
            return pl.BlockSpec(block_shape[kind], index)

        def rows_of(ref: Any) -> Array:
            """A block of rows, (heads, rows, ...) in float32."""
            x = ref[0, 0].astype(jnp.float32)
            return jnp.swapaxes(x, 0, 1) if self.inside else x[None]

        in_kinds = "b" * len(bank) + "rg" + "r" * len(cotangent)
        operands = (*bank, query, weights, *cotangent)
        loaded = [x for x, kind in zip(operands, in_kinds, strict=True) if kind == "r"]
        summed = [x for x, kind in zip(outputs, kinds, strict=True) if kind == "r"]

        def kernel(block, chunk, begin, pairs, *refs):
            inputs, refs = refs[: len(operands)], refs[len(operands) :]
            out_refs, scratch = refs[: len(outputs)], refs[len(outputs) :]
            turned, sums = scratch[: len(loaded)], scratch[len(loaded) :]
            *bank_refs, gate = inputs[: len(bank)] + inputs[len(bank) + 1 : len(bank) + 2]
            row_refs = inputs[len(bank) : len(bank) + 1] + inputs[len(bank) + 2 :]
            # Rows are summed in scratch memory before they are written.
            totals = (*sums, *out_refs[len(sums) :])
            run, chosen = pl.program_id(run_axis), list_of(pl.program_id(0))
            major, place = chunk if of_bank else block, chosen * num_runs + run
            begins = (run == 0) | (major[place] != major[jnp.maximum(place - 1, 0)])
            if of_bank:
                begins &= pl.program_id(tile_axis) == 0

            @pl.when(begins)
            def _():
                for total in totals:
                    total[...] = jnp.zeros_like(total)

            @pl.when(begins | of_bank)
            def _():
                for ref, into in zip(row_refs, turned, strict=True):
                    into[...] = rows_of(ref)

            first = chosen * (num_runs + 1) + run

            @pl.loop(np.int32(0), np.int32(self.together))
            def _(head):
                def visit(i, _):
                    packed = pairs[chosen * num_pairs + i]

                    @pl.when(packed >= 0)
                    def _():
                        state, slot = unpack(packed)
                        matrices = tuple(m[0, state, head].astype(jnp.float32) for m in bank_refs)
                        x, *more = (ref[head] for ref in turned)
                        weight = gate[head, 0, pl.ds(slot, 1), :].reshape(-1)
                        add((matrices, x, weight, *more), totals, head, state, slot)

                lax.fori_loop(begin[first], begin[first + 1], visit, None)

            if sums:
                ends = run == num_runs - 1
                ends |= major[place] != major[jnp.minimum(place + 1, num_lists * num_runs - 1)]

                @pl.when(ends)
                def _():
                    for ref, total in zip(out_refs, sums, strict=False):
                        x = jnp.swapaxes(total[...], 0, 1) if self.inside else total[0]
                        ref[0, 0] = x.astype(ref.dtype)

        return tpu_call(
            kernel,
            name=f"bank_read_{name}",
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(Runs._fields),
                grid=grid,
                in_specs=[spec(x.shape, kind) for x, kind in zip(operands, in_kinds, strict=True)],
                out_specs=[spec(x.shape, kind) for x, kind in zip(outputs, kinds, strict=True)],
                scratch_shapes=[
                    pltpu.VMEM((self.together, self.tile, x.shape[-1]), jnp.float32)
                    for x in (*loaded, *summed)
                ],
            ),
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_bytes=self.vmem,
        )(*map(jnp.asarray, runs), *operands)
