"""Polynomial features of keys and queries, which raise a memory's capacity."""

import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Float


def num_features(dim: int) -> int:
    """The number of monomials of degree 1 and 2 in ``dim`` variables."""
    return dim * (dim + 3) // 2


def polynomial(x: Float[Array, "*rows k"]) -> Float[Array, "*rows in"]:
    """The monomials of degree 1 and 2: x_i, x_i^2, and sqrt(2) x_i x_j for i < j.

    The inner product of two rows' features is that of the rows plus its square:
    <phi(x), phi(y)> = <x, y> + <x, y>^2.
    """
    first, second = np.triu_indices(x.shape[-1])
    scale = np.where(first == second, 1, np.sqrt(2)).astype(x.dtype)
    squares = x[..., first] * x[..., second]
    return jnp.concatenate([x, jnp.broadcast_to(scale, squares.shape) * squares], axis=-1)
