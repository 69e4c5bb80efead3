"""Reads of large states as sums of reads of smaller ones, for kernels that cannot hold the whole.

A read takes ``(matrices, rows (c, k), gate (c) or None)`` and returns rows (c, v), times the gate.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from memcache_jax._typing import Array, Float, Matrices
from memcache_jax.kernels._shapes import fits_triton

Fits: TypeAlias = Callable[[Sequence[tuple[int, ...]]], bool]
"""Whether matrices of these shapes, (in, out) each, are small enough together."""


class Band(NamedTuple):
    """One of the reads that add up to the read of a state.

    Attributes:
      read: reads the band.
      matrices: the band of each state.
      query: the query of the band.
    """

    read: Callable[..., Array]
    matrices: Matrices
    query: Float[Array, "... k"]


def sum_of_bands(
    divide: Callable[[Matrices, Array, Fits], list[Band]],
    bank: Matrices,
    query: Float[Array, "... k"],
    implementation: str | None,
    read_band: Callable[[Callable[..., Array], Matrices, Array], Array],
) -> Array:
    """Reads a bank of states, band by band if the implementation cannot hold a whole state.

    Args:
      divide: makes the bands, such as ``bands_of_matrix`` of a read.
      bank: the states' matrices.
      query: the queries.
      implementation: the implementation of the reads.
      read_band: reads a bank, given how to read one state, the bank and the queries.
    """
    fits = fits_triton if implementation == "pallas_gpu" else lambda shapes: True
    return functools.reduce(jnp.add, (read_band(*band) for band in divide(bank, query, fits)))


def bands_of_matrix(
    read: Callable[..., Array],
    matrices: Matrices,
    query: Float[Array, "... in"],
    fits: Fits,
) -> list[Band]:
    """Divides M(x) = x W into as few bands of rows of W as fit."""
    (matrix,) = matrices
    rows, columns = matrix.shape[-2:]
    count = fewest_bands(rows, lambda size: fits([(size, columns)]))
    bands = zip(jnp.split(matrix, count, -2), jnp.split(query, count, -1), strict=True)
    return [Band(read, (band,), x) for band, x in bands]


def bands_of_network(
    read: Callable[..., Array],
    matrices: Matrices,
    query: Float[Array, "... k"],
    fits: Fits,
) -> list[Band]:
    """Divides M(x) = x + gelu(x W_0) W_1 into as few groups of hidden units as fit.

    The first band uses ``read``, and so adds the query; the others read their hidden units alone.
    """
    inner, outer = matrices
    (rows, hidden), columns = inner.shape[-2:], outer.shape[-1]
    count = fewest_bands(hidden, lambda size: fits([(rows, size), (size, columns)]))
    parts = zip(jnp.split(inner, count, -1), jnp.split(outer, count, -2), strict=True)
    reads = [read, *[_read_hidden] * (count - 1)]
    return [Band(read, part, query) for read, part in zip(reads, parts, strict=True)]


def fewest_bands(size: int, fits: Callable[[int], bool]) -> int:
    """The fewest equal bands, each of size two or more, that all fit; one if none do."""
    counts = (count for count in range(1, size) if size % count == 0 and fits(size // count))
    return next(counts, 1)


def gated(gate: Float[Array, "rows"] | None, x: Float[Array, "*rows in"]) -> Array:
    """Returns the rows of x, each times its gate if there is one.

    The gate's gradient, a sum over the row, is accumulated in float32 or wider.
    """
    if gate is None:
        return x
    wide = gate.astype(jnp.promote_types(gate.dtype, jnp.float32))
    return jnp.broadcast_to(wide[:, None], x.shape).astype(gate.dtype) * x


def blind_where_gates_are_zero(read: Callable[..., Array]) -> Callable[..., Array]:
    """A read in which rows with a gate of 0 neither read the state nor send it gradients.

    Inputs are masked as well as outputs: 0 * NaN is NaN, forward and backward.
    """

    def seen(x: Array, gate: Array) -> Array:
        gate = gate.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(jnp.broadcast_to(gate, x.shape) != 0, x, 0)

    def blind(matrices: Matrices, x: Array, gate: Array | None = None) -> Array:
        if gate is None:
            return read(matrices, x)
        by_any = jnp.max(jnp.abs(gate)) != 0
        matrices = tuple(jnp.where(by_any, matrix, 0) for matrix in matrices)
        # Masked by itself, the gate has a gradient of zero where it is zero.
        return seen(read(matrices, seen(x, gate), seen(gate, gate)), gate)

    return blind


def gelu(x: Array) -> Array:
    """GELU in float32 or wider: Triton has no tanh of narrower numbers."""
    return jax.nn.gelu(x.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)


def _read_hidden(
    matrices: Matrices, query: Float[Array, "rows k"], gate: Float[Array, "rows"] | None = None
) -> Array:
    """What some hidden units add to the read of a two-layer network."""
    inner, outer = matrices
    return jnp.matmul(gated(gate, gelu(jnp.matmul(query, inner))), outer)
