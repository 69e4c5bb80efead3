"""Running sums in two levels, with a derivative by hand for a CPU's sake."""

import jax
import jax.numpy as jnp

from memcache_jax._typing import Array, Float


def running_sum(x: Float[Array, "n c k"], width: int = 16) -> Float[Array, "n c k"]:
    """Cumulative sum over c, ``width`` rows at a time: ``jnp.cumsum`` of all of c is slow on CPUs.

    Args:
      x: the rows.
      width: rows that one matrix product sums.
    """
    n, c, k = x.shape
    rows = jnp.pad(x, ((0, 0), (0, -c % width), (0, 0))).reshape(n, -1, width, k)
    ones = jnp.broadcast_to(jnp.tri(width, dtype=x.dtype), (*rows.shape[:2], width, width))
    inner = _sums_of_rows(ones, rows)
    before = jnp.cumsum(inner[:, :, -1], axis=1) - inner[:, :, -1]
    return (inner + before[:, :, None]).reshape(n, -1, k)[:, :c]


def _products(constants: Float[Array, "n w i j"], x: Float[Array, "n w j k"]) -> Array:
    return jnp.einsum("nwij,nwjk->nwik", constants, x, precision="highest")


@jax.custom_vjp
def _sums_of_rows(constants: Float[Array, "n w i j"], x: Float[Array, "n w j k"]) -> Array:
    """Products with constants, which come first backward too.

    With x first, or one constant for all, XLA's CPU backend transposes x, which takes longer.
    """
    return _products(constants, x)


_sums_of_rows.defvjp(
    lambda constants, x: (_products(constants, x), constants),
    lambda constants, d_y: (None, _products(jnp.matrix_transpose(constants), d_y)),
)
