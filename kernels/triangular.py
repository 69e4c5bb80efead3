"""Unit lower triangular systems in matrix products, which every accelerator has."""

import jax
import jax.numpy as jnp

from memcache_jax._typing import Array, Float


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
    inverse = _inverse(system)
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
