"""Softmax over cached and online scores, with a derivative by hand for a CPU's sake."""

from typing import Any

import jax
import jax.numpy as jnp

from memcache_jax._typing import Array, Float


@jax.custom_jvp
def softmax_gates(
    cached: Float[Array, "... r"], online: Float[Array, "..."]
) -> tuple[Float[Array, "... r"], Float[Array, "..."]]:
    """Softmax over the visible cached states and the online one together (Eq. 10).

    Args:
      cached: scores of the cached states, -inf for those that are not visible.
      online: score of the online state.

    Returns:
      The gates of both.
    """
    largest = jnp.maximum(jnp.max(cached, axis=-1, initial=-jnp.inf), online)
    cached, online = jnp.exp(cached - largest[..., None]), jnp.exp(online - largest)
    total = cached.sum(axis=-1) + online
    return cached / total[..., None], online / total


@softmax_gates.defjvp
def _softmax_gates_jvp(scores: tuple[Array, Array], d_scores: tuple[Array, Array]) -> Any:
    # JAX's own derivative concatenates and splits arrays of few states, and sums them slowly on
    # CPUs.
    cached, online = gates = softmax_gates(*scores)
    d_cached, d_online = d_scores
    mean = jnp.vecdot(cached, d_cached, precision="highest") + online * d_online
    along = jnp.einsum("...r,...->...r", cached, mean, precision="highest")
    return gates, (cached * d_cached - along, online * (d_online - mean))
