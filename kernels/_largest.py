"""The largest entries along the last axis, also of arrays that the compiler divides."""

import jax.numpy as jnp
from jax import lax

from memcache_jax._typing import Array, Float, Int
from memcache_jax.kernels._dispatch import compiler_divides


def largest(x: Float[Array, "... n"], k: int) -> tuple[Float[Array, "... k"], Int[Array, "... k"]]:
    """Returns the k largest entries, of which none is NaN, and their places; ties by place."""
    if not compiler_divides(x):
        values, places = lax.top_k(x, k)
        return values, places
    # The compiler gathers what `lax.top_k` takes, but not what is sorted.
    places = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    least, places = lax.sort((-x, places), num_keys=1, is_stable=True)
    return -least[..., :k], places[..., :k]
