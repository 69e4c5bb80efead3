"""The routing on a TPU: a tile of tokens at a time, whose relevance stays in vector memory.

Slots lie along sublanes and tokens along lanes, so that the largest of the slots are found without
moving lanes. The backward pass forms the gradients of a tile's logits, zero except for the selected
ones, and multiplies them with keys and tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from memcache_jax._typing import Array, Float, Int
from memcache_jax.kernels._block_sizes import block_sizes
from memcache_jax.kernels._dispatch import check_served
from memcache_jax.kernels._shapes import dtype_reasons
from memcache_jax.kernels._tpu import LANES, tile_bytes, tpu_call, vmem_reason
from memcache_jax.kernels.ssc_route._shared import by_kernels, scattered, select


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """What one step of the kernels holds.

    Attributes:
      rows: tokens that are routed at once, a multiple of 128.
    """

    rows: int


def ssc_route(
    connector: Float[Array, "b h n c u"],
    pooled: Float[Array, "b h buckets u"],
    online: Float[Array, "b h n c"],
    reads: np.ndarray,
    top_k: int,
) -> tuple[Float[Array, "b h n c s"], Float[Array, "b h n c"], Int[Array, "b h n c s"]]:
    """See ``api.ssc_route``."""
    rows, features = connector.shape[3:]
    slots = max(reads.shape[1], 1)
    shape = f"r{slots} c{rows} u{features} s{top_k}"
    sizes = block_sizes(BlockSizes, "ssc_route/pallas_tpu", shape, connector.dtype)
    tiles = -(-rows // sizes.rows)
    tile = rows if tiles == 1 else -(-rows // (tiles * LANES)) * LANES
    # Logits and their copies, and double-buffered keys and rows with their gradients.
    vmem = 8 * tile_bytes((slots, tile)) + 6 * tile_bytes((slots + tile, features))
    check_served(
        "ssc_route",
        "pallas_tpu",
        [
            *dtype_reasons(connector, pooled, online),
            vmem_reason(("any pass", vmem)),
        ],
    )
    kernels = _Kernels(top_k, tile, vmem)
    return by_kernels(
        kernels, connector, pooled, online, reads, top_k, tiles * tile, slots, features
    )


@dataclasses.dataclass(frozen=True)
class _Kernels:
    """The kernels of one routing.

    Attributes:
      top_k: states that a token selects.
      tile: tokens that are routed at once.
      vmem: bytes of vector memory.
    """

    top_k: int
    tile: int
    vmem: int

    def forward(self, connector: Array, keys: Array, online: Array, reads: Array) -> tuple:
        def kernel(reads, connector, keys, online, gates, online_gate, states):
            logits = lax.dot_general(
                keys[0, 0], connector[0, 0], (((1,), (1,)), ((), ())), precision="highest"
            )
            column = reads[0, 0][:, None]
            some, online_gate[0, 0], chosen = select(logits, column, online[0, 0], self.top_k, 0)
            for j in range(self.top_k):
                gates[0, 0, j : j + 1] = some[j]
                states[0, 0, j : j + 1] = chosen[j]

        units, blocks, rows, _ = connector.shape
        many = jax.ShapeDtypeStruct((units, blocks, self.top_k, rows), jnp.float32)
        one = jax.ShapeDtypeStruct((units, blocks, 1, rows), jnp.float32)
        gates, online_gate, states = self._call(
            "forward",
            kernel,
            (reads, connector, keys, online[:, :, None]),
            "wrkg",
            (many, one, many),
            "ggg",
        )
        return gates, online_gate[:, :, 0], states

    def backward(
        self, connector: Array, keys: Array, reads: Array, states: Array, d_logits: Array
    ) -> tuple:
        tables = keys.shape[1]

        def kernel(reads, connector, keys, states, d_logits, d_connector, d_keys):
            first = pl.program_id(2) == 0
            if tables == 1:
                first &= pl.program_id(1) == 0

            @pl.when(first)
            def _():
                d_keys[...] = jnp.zeros_like(d_keys)

            selected = range(self.top_k)
            d_all = scattered(
                [d_logits[0, 0, j : j + 1] for j in selected],
                [states[0, 0, j : j + 1] for j in selected],
                reads[0, 0][:, None],
            )
            d_connector[0, 0] = lax.dot_general(
                d_all, keys[0, 0], (((0,), (0,)), ((), ())), precision="highest"
            )
            d_keys[0, 0] += jnp.matmul(d_all, connector[0, 0], precision="highest")

        shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (connector, keys)]
        operands = (reads, connector, keys, states, d_logits)
        return self._call("backward", kernel, operands, "wrkgg", shapes, "rk")

    def _call(self, name, kernel, operands, in_kinds, outputs, out_kinds):
        """Calls a kernel for every tile of every block and unit.

        The kinds of arrays are "w" the states in a block's slots, "r" rows, "k" keys, and "g"
        arrays with tokens along the last axis.
        """
        connector, keys = operands[1:3]
        units, blocks, rows, _ = connector.shape
        tables = keys.shape[1]

        def spec(shape: tuple[int, ...], kind: str) -> pl.BlockSpec:
            blocks_and_maps = {
                "w": ((1, *shape[1:]), lambda u, b, t: (b, 0, 0)),
                "r": ((1, 1, self.tile, shape[-1]), lambda u, b, t: (u, b, t, 0)),
                "k": ((1, 1, *shape[2:]), lambda u, b, t: (u, b if tables > 1 else 0, 0, 0)),
                "g": ((1, 1, shape[-2], self.tile), lambda u, b, t: (u, b, 0, t)),
            }
            return pl.BlockSpec(*blocks_and_maps[kind])

        return tpu_call(
            kernel,
            name=f"ssc_route_{name}",
            grid=(units, blocks, rows // self.tile),
            in_specs=[spec(x.shape, kind) for x, kind in zip(operands, in_kinds, strict=True)],
            out_specs=[spec(x.shape, kind) for x, kind in zip(outputs, out_kinds, strict=True)],
            out_shape=list(outputs),
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_bytes=self.vmem,
        )(*operands)
