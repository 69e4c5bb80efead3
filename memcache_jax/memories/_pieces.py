"""Reads of large states as sums of reads of smaller ones, which kernels have room for."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp

from memcache_jax._typing import Array, Float, Matrices
from memcache_jax.kernels._shapes import fits_triton

Fits: TypeAlias = Callable[[Sequence[tuple[int, ...]]], bool]
"""Whether matrices of these shapes, (in, out) each, are small enough together."""


class Piece(NamedTuple):
    """One of the reads that add up to the read of a state.

    Attributes:
      read: of the piece.
      matrices: the piece of each state.
      query: what reads it.
    """

    read: Callable[..., Array]
    matrices: Matrices
    query: Float[Array, "... k"]


def sum_of_pieces(
    divide: Callable[[Matrices, Array, Fits], list[Piece]],
    bank: Matrices,
    query: Float[Array, "... k"],
    implementation: str | None,
    read_piece: Callable[[Callable[..., Array], Matrices, Array], Array],
) -> Array:
    """What a bank's states are read as, in pieces where an implementation has no room for them.

    Args:
      divide: a memory's ``pieces``, or another function like it.
      bank: the states' matrices.
      query: what reads them.
      implementation: of the reads.
      read_piece: reads a bank, given how one state is read, the bank and the queries.
    """
    fits = fits_triton if implementation == "pallas_gpu" else lambda shapes: True
    return functools.reduce(jnp.add, (read_piece(*piece) for piece in divide(bank, query, fits)))


def pieces_of_matrix(
    read: Callable[..., Array],
    matrices: Matrices,
    query: Float[Array, "... in"],
    fits: Fits,
) -> list[Piece]:
    """A product with a matrix as the sum of those with as few bands of its rows as fit."""
    (matrix,) = matrices
    rows, columns = matrix.shape[-2:]
    count = fewest_pieces(rows, lambda size: fits([(size, columns)]))
    bands = zip(jnp.split(matrix, count, -2), jnp.split(query, count, -1), strict=True)
    return [Piece(read, (band,), x) for band, x in bands]


def fewest_pieces(size: int, fits: Callable[[int], bool]) -> int:
    """The fewest equal pieces, of two or more, of which each fits; one piece where none does."""
    counts = (count for count in range(1, size) if size % count == 0 and fits(size // count))
    return next(counts, 1)
