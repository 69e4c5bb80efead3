"""Products of per-token decays, from their logs."""

import jax.numpy as jnp

from memcache_jax._typing import Array, Float

_ZERO = -1e6  # the log of a decay that is as good as zero, in any sum; -inf may be given


def start_decay(log_decay: Float[Array, "m"]) -> Float[Array, "m"]:
    """Returns the product of the decays up to and including each token."""
    return jnp.exp(running_sum(jnp.maximum(log_decay, _ZERO)))


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
    logs = running_sum(jnp.where(below, jnp.maximum(log_decay, _ZERO)[:, None], 0.0))
    return jnp.where(jnp.tri(size, dtype=bool), jnp.exp(logs), 0.0)
