"""The relevance of segments on a TPU, from connectors and keys in the model's layout.

A program takes some heads of one row and visits the segments in order, or backward from the last to
the first. Pooled keys, or their gradients, stay in vector memory. Running sums of keys are products
with triangular matrices, and are never written. All arithmetic is float32.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memcache_jax._typing import Array, Float
from memcache_jax.kernels._dispatch import check_served
from memcache_jax.kernels._shapes import dtype_reasons
from memcache_jax.kernels._tpu import LANES, tile_bytes, tpu_call, vmem_left, vmem_reason


def relevance(
    connector: Float[Array, "b h n c k"], key: Float[Array, "b h n c k"], pooling: str
) -> tuple[Float[Array, "b h n c r"], Float[Array, "b h n c"]]:
    """See ``api.relevance``."""
    _, heads, blocks, rows, features = key.shape
    of_head = 12 * tile_bytes((rows, features)) + 6 * tile_bytes((blocks, max(rows, features)))
    sizes = [size for size in range(heads, 0, -1) if heads % size == 0]
    sizes = [size for size in sizes if size in (heads, size // 8 * 8)]
    together = next((size for size in sizes if vmem_left(size * of_head)), sizes[-1])
    reasons = [
        *dtype_reasons(connector, key),
        (blocks < 2, "a single segment"),
        vmem_reason(("any pass", together * of_head)),
    ]
    check_served("relevance", "pallas_tpu", reasons)
    kernels = _Kernels(together, pooling == "mean", together * of_head)

    @jax.custom_vjp
    def products(connector: Array, key: Array) -> tuple[Array, Array]:
        return forward(connector, key)[0]

    def forward(connector: Array, key: Array) -> tuple[tuple[Array, Array], tuple]:
        cached, live, pooled = kernels.forward(connector, key)
        return (cached, live), (connector, key, pooled)

    def backward(residuals: tuple, cotangents: tuple[Array, Array]) -> tuple[Array, ...]:
        connector, key, pooled = residuals
        return tuple(kernels.backward(connector, key, pooled, *cotangents))

    products.defvjp(forward, backward)
    cached, live = products(*(jnp.moveaxis(x, 1, 3) for x in (connector, key)))
    return jnp.swapaxes(cached, 3, 4), live[:, :, :, 0]


@dataclasses.dataclass(frozen=True)
class _Kernels:
    """The kernels, of connectors and keys (b, n, c, h, k).

    Attributes:
      together: heads that a program takes.
      mean: whether keys are pooled by their mean.
      vmem: bytes of vector memory.
    """

    together: int
    mean: bool
    vmem: int

    def forward(self, connector: Array, key: Array) -> Sequence[Array]:
        """The products with segments (b, h, n, r, c) and live (b, h, n, 1, c), and pooled keys."""
        b, n, c, h, k = key.shape

        def segment(head: Any, block: Any, turned: Any, outputs: Any) -> None:
            cached_ref, live_ref, pooled_ref = outputs
            u, keys = (x[head].astype(jnp.float32) for x in turned)
            whole, pooled = _finite_rows(pooled_ref[0, head])
            cached = jnp.where(whole, _dot(pooled, u, 1, 1), jnp.nan)
            cached_ref[0, head, 0] = cached[: n - 1]
            for place, counts, running in self._running(keys):
                products = _dot(jnp.ones((8, k), jnp.float32), u[place] * running, 1, 1)
                live_ref[0, head, 0, :, place] = products[:1] / counts
            total = keys.sum(axis=0, keepdims=True)
            pooled_ref[0, head, pl.ds(block, 1), :] = total / c if self.mean else total

        def kernel(u_ref, k_ref, cached_ref, live_ref, pooled_ref, u_turned, k_turned):
            block = pl.program_id(2)

            @pl.when(block == 0)
            def _():
                pooled_ref[...] = jnp.zeros_like(pooled_ref)

            _turn((u_ref, k_ref), (u_turned, k_turned))
            outputs = cached_ref, live_ref, pooled_ref
            for_each = pl.loop(np.int32(0), np.int32(self.together))
            for_each(lambda head: segment(head, block, (u_turned, k_turned), outputs))

        shapes = (b, h, n, n - 1, c), (b, h, n, 1, c), (b, h, n, k)
        outputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return self._call("forward", kernel, (connector, key), outputs, [], lambda s: s)

    def backward(
        self, connector: Array, key: Array, pooled: Array, d_cached: Array, d_live: Array
    ) -> Sequence[Array]:
        """The cotangents of connectors and keys."""
        _, n, c, _, k = key.shape

        def segment(head: Any, block: Any, inputs: Any, turned: Any, d_pooled: Any) -> None:
            pooled_ref, d_cached_ref, d_live_ref = inputs
            u, keys = (x[head].astype(jnp.float32) for x in turned)
            whole, pooled = (x[: n - 1] for x in _finite_rows(pooled_ref[0, head]))
            before = lax.broadcasted_iota(jnp.int32, (n - 1, 1), 0) < block
            d_cached = jnp.where(whole & before, d_cached_ref[0, head, 0], 0)
            d_u = _dot(d_cached, pooled, 0, 0)
            d_pooled[head, : n - 1] += _dot(d_cached, u, 1, 0)
            d_total = d_pooled[head, pl.ds(block, 1), :]
            d_total = d_total / c if self.mean else d_total
            d_runs = []
            for place, counts, running in self._running(keys):
                d = _column(d_live_ref[0, head, 0, :, place] / counts)
                turned[0][head, place] = (d_u[place] + d * running).astype(turned[0].dtype)
                d_runs.append((place, d * u[place]))
            later = jnp.zeros((1, k), jnp.float32)
            for place, d_running in reversed(d_runs):
                d_keys = _dot(_triangle(len(d_running)), d_running, 0, 0) + later
                d_keys = jnp.where(jnp.isfinite(keys[place]), d_keys, 0) + d_total
                turned[1][head, place] = d_keys.astype(turned[1].dtype)
                later += d_running.sum(axis=0, keepdims=True)

        def kernel(u_ref, k_ref, pooled_ref, d_cached_ref, d_live_ref, d_u_ref, d_k_ref, *scratch):
            *turned, d_pooled = scratch
            step = pl.program_id(2)

            @pl.when(step == 0)
            def _():
                d_pooled[...] = jnp.zeros_like(d_pooled)

            _turn((u_ref, k_ref), turned)
            inputs = pooled_ref, d_cached_ref, d_live_ref
            for_each = pl.loop(np.int32(0), np.int32(self.together))
            for_each(lambda head: segment(head, n - 1 - step, inputs, turned, d_pooled))
            for ref, of in zip((d_u_ref, d_k_ref), turned, strict=True):
                ref[0, 0] = jnp.swapaxes(of[...].astype(jnp.float32), 0, 1).astype(ref.dtype)

        operands = (connector, key, pooled, d_cached, d_live)
        scratch = [pltpu.VMEM((self.together, n, k), jnp.float32)]
        return self._call("backward", kernel, operands, operands[:2], scratch, lambda s: n - 1 - s)

    def _running(self, keys: Array) -> Iterator[tuple[slice, Array | float, Array]]:
        """Pieces of a segment: their rows, how many keys each has seen, and sums of these."""
        before = jnp.zeros((1, keys.shape[1]), jnp.float32)
        for first in range(0, len(keys), LANES):
            place = slice(first, min(first + LANES, len(keys)))
            piece = keys[place]
            finite = jnp.where(jnp.isfinite(piece), piece, 0)
            running = _dot(_triangle(len(piece)), finite, 1, 0) + before
            counts = lax.broadcasted_iota(jnp.int32, (1, len(piece)), 1) + (first + 1)
            yield place, counts.astype(jnp.float32) if self.mean else 1.0, running
            before = running[-1:]

    def _call(
        self,
        name: str,
        kernel: Callable[..., None],
        operands: Sequence[Array],
        outputs: Sequence[Any],
        scratch: list,
        segment: Callable[[Any], Any],
    ) -> Sequence[Array]:
        """Visits the segments, of step s the one that ``segment`` returns."""
        b, n, c, h, k = operands[1].shape

        def spec(x: Any) -> pl.BlockSpec:
            if x.shape == (b, n, c, h, k):
                shape = (1, 1, c, self.together, k)
                return pl.BlockSpec(shape, lambda i, p, s: (i, segment(s), 0, p, 0))
            if x.ndim == 4:
                return pl.BlockSpec((1, self.together, n, k), lambda i, p, s: (i, p, 0, 0))
            shape = (1, self.together, 1, *x.shape[3:])
            return pl.BlockSpec(shape, lambda i, p, s: (i, p, segment(s), 0, 0))

        turned = [pltpu.VMEM((self.together, c, k), x.dtype) for x in operands[:2]]
        return tpu_call(
            kernel,
            grid=(b, h // self.together, n),
            in_specs=[spec(x) for x in operands],
            out_specs=[spec(x) for x in outputs],
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
            scratch_shapes=[*turned, *scratch],
            name=f"relevance_{name}",
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_bytes=self.vmem,
        )(*operands)


def _turn(refs: Sequence[Any], turned: Sequence[Any]) -> None:
    """Transposes blocks (c, heads, k) in vector memory to (heads, c, k)."""
    for ref, into in zip(refs, turned, strict=True):
        into[...] = jnp.swapaxes(ref[0, 0].astype(jnp.float32), 0, 1).astype(into.dtype)


def _dot(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """The product of two matrices along an axis of each."""
    along = ((x_axis,), (y_axis,)), ((), ())
    return lax.dot_general(x, y, along, precision="highest", preferred_element_type=jnp.float32)


def _triangle(size: int) -> Array:
    """Ones where a row sees a column."""
    row, column = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    return jnp.where(column <= row, 1.0, jnp.zeros((size, size), jnp.float32))


def _column(x: Float[Array, "1 m"]) -> Float[Array, "m 1"]:
    """A row as a column."""
    size = x.shape[1]
    row, column = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    return jnp.where(row == column, x, 0).sum(axis=1, keepdims=True)


def _finite_rows(x: Float[Array, "n k"]) -> tuple[Array, Array]:
    """Whether each row is finite (n, 1), and the rows with zeros for those that are not."""
    finite = jnp.where(jnp.isfinite(x), jnp.ones_like(x), 0).min(axis=1, keepdims=True) > 0
    return finite, jnp.where(finite, x, 0)
