"""The grouped read on a TPU: a grid over blocks of rows, each of which names its state.

A small bank that fits into vector memory goes to the bank read instead, without sorting: each row
reads all states that any row of its block has chosen, with a gate of zero for those that it has
not.

The backward pass recomputes the reads, and adds up a state's gradient over its consecutive blocks.
All arithmetic is float32, with products as exact as the caller's ``jax.default_matmul_precision``.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memcache_jax._typing import Array, Float, Int, Matrices
from memcache_jax.kernels._block_sizes import block_sizes
from memcache_jax.kernels._dispatch import CannotServeError, check_served
from memcache_jax.kernels._shapes import dtype_reasons, power_of_two, read_shape, shape_key
from memcache_jax.kernels._tpu import smem_reason, tile_bytes, tpu_call, vmem_reason
from memcache_jax.kernels.bands import blind_where_gates_are_zero
from memcache_jax.kernels.bank_read.tpu import bank_read, holds_all_states
from memcache_jax.kernels.grouped_read._blocks import by_kernels, most_blocks

_MOST_STATES = 16  # per choice for the bank read: more products, but no sorted rows to move


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """What one step of the kernels holds.

    Attributes:
      rows: the most rows of a block, a power of two from 16 on.
    """

    rows: int


def grouped_read(
    read: Callable[..., Array],
    bank: Matrices,
    query: Float[Array, "b h n c k"],
    gates: Float[Array, "b h n c s"],
    states: Int[Array, "b h n c s"],
) -> Float[Array, "b h n c v"]:
    """See ``api.grouped_read``."""
    if bank[0].shape[2] <= _MOST_STATES * states.shape[-1] and holds_all_states(bank, query):
        with contextlib.suppress(CannotServeError):  # its lists may exceed scalar memory
            return _read_all(read, bank, query, gates, states)
    row = read_shape(read, bank, query)
    sizes = block_sizes(
        BlockSizes, "grouped_read/pallas_tpu", shape_key(bank, query.shape[3]), query.dtype
    )
    shapes = [m.shape[3:] for m in bank]
    pairs = states.shape[2] * states.shape[3] * states.shape[4]
    rows = min(sizes.rows, power_of_two(-(-pairs // bank[0].shape[2])))
    num_blocks = most_blocks(pairs, bank[0].shape[2], rows)
    widest = max(query.shape[-1], *(max(shape) for shape in shapes))
    # Blocks are double-buffered; so is a state's gradient.
    vmem = 4 * sum(map(tile_bytes, shapes)) + 16 * tile_bytes((rows, widest))
    check_served(
        "grouped_read",
        "pallas_tpu",
        [
            *dtype_reasons(*bank, query, gates),
            vmem_reason(("any pass", vmem)),
            smem_reason(num_blocks),
        ],
    )
    y = by_kernels(
        lambda rows: _Kernels(read, rows, row.shape[-1], vmem), rows, bank, query, gates, states
    )
    return y.astype(row.dtype)


def _read_all(
    read: Callable[..., Array],
    bank: Matrices,
    query: Float[Array, "b h n c k"],
    gates: Float[Array, "b h n c s"],
    states: Int[Array, "b h n c s"],
) -> Float[Array, "b h n c v"]:
    """The grouped read as a bank read with a slot for every state."""
    numbers = jnp.arange(bank[0].shape[2])
    chosen = states[..., None] == numbers.reshape(1, 1, 1, 1, 1, -1)
    # A chosen state is read, and its gate gets a gradient, even if the gate is zero.
    least = jnp.finfo(jnp.float32).tiny
    gates = gates.astype(jnp.float32)
    gates += lax.stop_gradient(jnp.where(gates == 0, least, 0))
    weights = jnp.where(chosen, gates[..., None], 0).sum(axis=4)
    by_any = chosen.any(axis=(1, 3, 4))
    reads = jnp.where(by_any, numbers[None, None], -1)
    return bank_read(blind_where_gates_are_zero(read), bank, query, weights, reads)


@dataclasses.dataclass(frozen=True)
class _Kernels:
    """The kernels of one read.

    Attributes:
      read: as in ``api.grouped_read``.
      rows: rows of a block.
      out_features: width of what is read.
      vmem: bytes of vector memory.
    """

    read: Callable[..., Array]
    rows: int
    out_features: int
    vmem: int

    def forward(self, state: Array, bank: Matrices, rows: Array, weights: Array) -> Array:
        def kernel(state, *refs):
            *bank, rows, weights, y = refs
            y[0, 0] = self.read(*_loaded(bank, rows, weights))

        shape = (*rows.shape[:3], self.out_features)
        return self._call("forward", kernel, state, (bank, rows, weights), [shape], "r")[0]

    def backward(
        self, state: Array, bank: Matrices, rows: Array, weights: Array, cotangent: Array
    ) -> tuple[Sequence[Array], Array, Array]:
        num_blocks, layers = state.shape[1], len(bank)

        def kernel(state, *refs):
            (*bank, rows, weights, cotangent), outputs = refs[: layers + 3], refs[layers + 3 :]
            *d_bank, d_rows, d_weights = outputs
            block = pl.program_id(1)
            place = pl.program_id(0) * num_blocks + block

            @pl.when((block == 0) | (state[place] != state[jnp.maximum(place - 1, 0)]))
            def _():
                for total in d_bank:
                    total[...] = jnp.zeros_like(total)

            pull = jax.vjp(self.read, *_loaded(bank, rows, weights))[1]
            changes, d_x, d_weight = pull(cotangent[0, 0].astype(jnp.float32))
            d_rows[0, 0] = d_x
            d_weights[0, 0] = d_weight.reshape(1, -1)
            for total, change in zip(d_bank, changes, strict=True):
                total[0, 0] += change

        weights_shape = (*weights.shape[:2], 1, self.rows)
        shapes = [*(m.shape for m in bank), rows.shape, weights_shape]
        *d_bank, d_rows, d_weights = self._call(
            "backward",
            kernel,
            state,
            (bank, rows, weights, cotangent),
            shapes,
            "b" * layers + "rg",
        )
        return d_bank, d_rows, d_weights.reshape(weights.shape)

    def _call(
        self,
        name: str,
        kernel: Callable[..., None],
        state: Array,
        arrays: tuple,
        outputs: Sequence[tuple[int, ...]],
        kinds: str,
    ) -> Sequence[Array]:
        """Calls a kernel for every block of every unit.

        Args:
          name: of the kernel.
          kernel: the kernel.
          state: the state of each block, (units, blocks).
          arrays: bank, rows, weights and maybe a cotangent.
          outputs: shapes of the outputs, in float32.
          kinds: what each one is: "r" rows, "g" weights, "b" a matrix of the bank.
        """
        units, num_blocks = state.shape
        parts = _parts(units, num_blocks)
        if parts > 1:  # the state of every block is in scalar memory at once
            shapes = [(units // parts, *shape[1:]) for shape in outputs]
            split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), (state, arrays))
            every = lax.map(lambda xs: self._call(name, kernel, xs[0], xs[1], shapes, kinds), split)
            return [x.reshape(shape) for x, shape in zip(every, outputs, strict=True)]
        bank, rows, weights, *cotangent = arrays
        operands = (*bank, rows, weights[:, :, None], *cotangent)

        def spec(shape: tuple[int, ...], kind: str) -> pl.BlockSpec:
            def index(unit, block, state):
                place = state[unit * num_blocks + block] if kind == "b" else block
                return unit, place, 0, 0

            return pl.BlockSpec((1, 1, *shape[2:]), index)

        in_kinds = "b" * len(bank) + "rg" + "r" * len(cotangent)
        return tpu_call(
            kernel,
            name=f"grouped_read_{name}",
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(units, num_blocks),
                in_specs=[spec(x.shape, kind) for x, kind in zip(operands, in_kinds, strict=True)],
                out_specs=[spec(shape, kind) for shape, kind in zip(outputs, kinds, strict=True)],
            ),
            out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in outputs],
            dimension_semantics=("parallel", "arbitrary"),
            vmem_bytes=self.vmem,
        )(state.reshape(-1), *operands)


def _parts(units: int, num_blocks: int) -> int:
    """The number of equal parts in which units are read, so that each fits scalar memory."""
    every = (parts for parts in range(1, units + 1) if units % parts == 0)
    return next(parts for parts in every if not smem_reason(units // parts * num_blocks)[0])


def _loaded(bank: Sequence[Any], rows: Any, weights: Any) -> tuple:
    """A block's matrices, rows and weights, in float32."""
    matrices = tuple(m[0, 0].astype(jnp.float32) for m in bank)
    return (
        matrices,
        rows[0, 0].astype(jnp.float32),
        weights[0, 0].astype(jnp.float32).reshape(-1),
    )
