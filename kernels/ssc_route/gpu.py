"""The routing on a GPU, by Triton: one program per tile of tokens.

A program holds its tokens' relevance to all slots, and loads a few features of the keys at a time.
For the gradient of the keys there is one program per tile of slots, which loops over all tokens
that may select them. Arrays are padded with zeros to powers of two.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from memcache_jax._typing import Array, Float, Int
from memcache_jax.kernels._block_sizes import block_sizes
from memcache_jax.kernels._dispatch import check_served
from memcache_jax.kernels._shapes import dtype_reasons, power_of_two
from memcache_jax.kernels._triton import TritonSizes, for_each
from memcache_jax.kernels.ssc_route._shared import by_kernels, scattered, select

_LOGITS = 2**13  # that a program has registers for, beside those for selecting
_FEATURES = 32  # of the keys, loaded at once
_LEAST = 16  # tokens that a program takes
_SLOTS = 32  # whose keys' gradients one program computes


def ssc_route(
    connector: Float[Array, "b h n c u"],
    pooled: Float[Array, "b h buckets u"],
    online: Float[Array, "b h n c"],
    reads: np.ndarray,
    top_k: int,
) -> tuple[Float[Array, "b h n c s"], Float[Array, "b h n c"], Int[Array, "b h n c s"]]:
    """See ``api.ssc_route``."""
    rows, features = connector.shape[3:]
    slots, wide = power_of_two(reads.shape[1], _SLOTS), power_of_two(features, _FEATURES)
    check_served(
        "ssc_route",
        "pallas_gpu",
        [
            *dtype_reasons(connector, pooled, online),
            (
                slots * _LEAST > _LOGITS,
                f"{slots} slots, filled up, where registers hold {_LOGITS // _LEAST}",
            ),
        ],
    )
    shape = f"r{reads.shape[1]} c{rows} u{features} s{top_k}"
    sizes = block_sizes(TritonSizes, "ssc_route/pallas_gpu", shape, connector.dtype)
    tile = min(sizes.rows, power_of_two(rows), _LOGITS // slots)
    kernels = _Kernels(top_k, tile, sizes)
    full = -(-rows // tile) * tile
    return by_kernels(kernels, connector, pooled, online, reads, top_k, full, slots, wide)


@dataclasses.dataclass(frozen=True)
class _Kernels:
    """The kernels of one routing.

    Attributes:
      top_k: states that a token selects.
      tile: tokens that are routed at once.
      sizes: how programs run.
    """

    top_k: int
    tile: int
    sizes: TritonSizes

    def forward(self, connector: Array, keys: Array, online: Array, reads: Array) -> tuple:
        tables, slots, features = keys.shape[1:]

        def kernel(reads, connector, keys, online, gates, online_gate, states):
            unit, block, here = self._place()
            table = block if tables > 1 else 0

            def add(i, logits):
                part = self._part(i)
                rows, columns = connector[unit, block, here, part], keys[unit, table, :, part]
                return logits + jnp.matmul(rows, columns.T, precision="highest")

            zeros = jnp.zeros((self.tile, slots), jnp.float32)
            logits = for_each(features // _FEATURES, add, zeros)
            row, live = reads[block, 0][None], online[unit, block, here][:, None]
            some, own, chosen = select(logits, row, live, self.top_k, 1)
            online_gate[unit, block, here] = own.reshape(-1)
            for j in range(self.top_k):
                gates[unit, block, j, here] = some[j].reshape(-1)
                states[unit, block, j, here] = chosen[j].reshape(-1)

        units, blocks, rows, _ = connector.shape
        many = jax.ShapeDtypeStruct((units, blocks, self.top_k, rows), jnp.float32)
        one = jax.ShapeDtypeStruct((units, blocks, rows), jnp.float32)
        grid = (units, blocks, rows // self.tile)
        call = self.sizes.call("ssc_route_forward", kernel, grid, (many, one, many))
        return call(reads, connector, keys, online)

    def backward(
        self, connector: Array, keys: Array, reads: Array, states: Array, d_logits: Array
    ) -> tuple:
        units, blocks, rows, features = connector.shape
        tables, slots = keys.shape[1:3]
        tiles = rows // self.tile

        def scatter(unit, block, here, row, states, d_logits):
            selected = range(self.top_k)
            return scattered(
                [d_logits[unit, block, j, here][:, None] for j in selected],
                [states[unit, block, j, here][:, None] for j in selected],
                row[None],
            )

        def of_rows(reads, keys, states, d_logits, d_connector):
            unit, block, here = self._place()
            d_all = scatter(unit, block, here, reads[block, 0], states, d_logits)
            table = block if tables > 1 else 0

            def write(i, _):
                columns = keys[unit, table, :, self._part(i)]
                d_x = jnp.matmul(d_all, columns, precision="highest")
                d_connector[unit, block, here, self._part(i)] = d_x

            for_each(features // _FEATURES, write, None)

        def of_keys(reads, connector, states, d_logits, d_keys):
            unit, table = pl.program_id(0), pl.program_id(1)
            of_slots = pl.ds(pl.program_id(2) * _SLOTS, _SLOTS)

            def add(i, total):
                block = table if tables > 1 else lax.div(i, np.int32(tiles))
                here = pl.ds(lax.rem(i, np.int32(tiles)) * self.tile, self.tile)
                d_all = scatter(unit, block, here, reads[block, 0, of_slots], states, d_logits)
                rows = connector[unit, block, here, :]
                return total + jnp.matmul(d_all.T, rows, precision="highest")

            zeros = jnp.zeros((_SLOTS, features), jnp.float32)
            visits = tiles if tables > 1 else blocks * tiles
            d_keys[unit, table, of_slots, :] = for_each(visits, add, zeros)

        grid = (units, blocks, tiles)
        shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (connector, keys)]
        call = self.sizes.call("ssc_route_backward_rows", of_rows, grid, shapes[0])
        d_connector = call(reads, keys, states, d_logits)
        call = self.sizes.call(
            "ssc_route_backward_keys", of_keys, (units, tables, slots // _SLOTS), shapes[1]
        )
        return d_connector, call(reads, connector, states, d_logits)

    def _part(self, i: Any) -> Any:
        return pl.ds(i * _FEATURES, _FEATURES)

    def _place(self) -> tuple:
        """The unit, the block and the rows of a program."""
        return pl.program_id(0), pl.program_id(1), pl.ds(pl.program_id(2) * self.tile, self.tile)
