"""Products of per-token decays, from their logs."""

import jax.numpy as jnp

from memcache_jax._typing import Array, Float


def running_sum(x: Float[Array, "m ..."]) -> Float[Array, "m ..."]:
    """Cumulative sum of few rows, as the matrix product that every backend does fast."""
    return jnp.matmul(jnp.tri(x.shape[0], dtype=x.dtype), x, precision="highest")


def decay_matrix(log_decay: Float[Array, "m"]) -> Float[Array, "m m"]:
    """Returns D[t, j] = prod over j < i <= t of exp(log_decay_i); zero where j > t.

    Sums run over exactly the tokens of each product: differences of one running sum would lose
    the small decays that follow a strong one.
    """
    size = log_decay.shape[0]
    below = jnp.tri(size, k=-1, dtype=bool)
    logs = running_sum(jnp.where(below, log_decay[:, None], 0.0))
    return jnp.where(jnp.tri(size, dtype=bool), jnp.exp(logs), 0.0)
