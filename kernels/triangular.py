"""Unit lower triangular systems in matrix products, which every accelerator has."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax

from memcache_jax._typing import Array, Float

_WHOLE = contextvars.ContextVar("products_of_whole_matrices", default=False)


@contextlib.contextmanager
def in_whole_matrices() -> Iterator[None]:
    """Traces solves as products of whole matrices.

    They multiply many zeros, but nothing is cut or joined: what kernels need, which have matrix
    units and no cheap reshapes.
    """
    token = _WHOLE.set(True)
    try:
        yield
    finally:
        _WHOLE.reset(token)


def whole_matrices() -> bool:
    """Whether ``in_whole_matrices`` traces."""
    return _WHOLE.get()


@jax.custom_vjp
def solve_unit_lower(
    system: Float[Array, "m m"], sides: Float[Array, "m n"]
) -> Float[Array, "m n"]:
    """Solves (I + L) x = sides, where L is what ``system`` has below its diagonal.

    Example:
      >>> import jax.numpy as jnp
      >>> from memcache_jax.kernels.triangular import solve_unit_lower
      >>> solve_unit_lower(jnp.array([[0.0, 0.0], [2.0, 0.0]]), jnp.ones((2, 1)))[:, 0].tolist()
      [1.0, -1.0]
    """
    return _forward(system, sides)[0]


def _forward(system: Array, sides: Array) -> tuple[Array, tuple[Array, Array]]:
    inverse = _inverse_in_whole(system) if _WHOLE.get() else _inverse(system)
    solved = jnp.matmul(inverse, sides, precision="highest")
    return solved, (inverse, solved)


def _backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    inverse, solved = residuals
    sides = jnp.matmul(inverse.T, cotangent, precision="highest")
    return jnp.tril(-jnp.matmul(sides, solved.T, precision="highest"), -1), sides


solve_unit_lower.defvjp(_forward, _backward)


def _inverse(system: Float[Array, "m m"]) -> Float[Array, "m m"]:
    """The inverse of I + L, from those of its blocks on the diagonal, which double in size.

    [[A, 0], [B, C]] has the inverse [[A^-1, 0], [-C^-1 B A^-1, C^-1]].
    """
    rows = len(system)
    size = 1 << (rows - 1).bit_length()
    system = jnp.pad(system, (0, size - rows))
    blocks = jnp.ones((size, 1, 1), system.dtype)
    while len(blocks) > 1:
        pairs, width = len(blocks) // 2, blocks.shape[-1]
        upper, lower = blocks[0::2], blocks[1::2]
        tiles = system.reshape(pairs, 2, width, pairs, 2, width)[:, 1, :, :, 0]
        beside = jnp.moveaxis(jnp.diagonal(tiles, axis1=0, axis2=2), -1, 0)
        corner = -jnp.matmul(
            jnp.matmul(lower, beside, precision="highest"), upper, precision="highest"
        )
        top = jnp.concatenate([upper, jnp.zeros_like(upper)], axis=2)
        blocks = jnp.concatenate([top, jnp.concatenate([corner, lower], axis=2)], axis=1)
    return blocks[0, :rows, :rows]


def _inverse_in_whole(system: Float[Array, "m m"]) -> Float[Array, "m m"]:
    """``_inverse`` of all pairs of blocks at once: X - X B X, with X their inverses, B all corners.

    Its numbers are those of ``_inverse``, and zeros are added to them.
    """
    row, column = (lax.broadcasted_iota(jnp.int32, system.shape, axis) for axis in (0, 1))
    inverse = jnp.where(row == column, 1.0, 0.0).astype(system.dtype)
    for level in range((len(system) - 1).bit_length()):
        block_row, block_column = row >> level, column >> level
        is_corner = (block_row == block_column + 1) & (block_row & 1 == 1)
        corners = jnp.where(is_corner, system, 0.0)
        if level:  # the inverse of single tokens is I
            corners = jnp.matmul(inverse, corners, precision="highest")
            corners = jnp.matmul(corners, inverse, precision="highest")
        inverse -= corners
    return inverse
