"""The gated bank read as its equation: every block reads every state, and gates pick."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Float, Matrices


def bank_read(
    read: Callable[[Matrices, Array], Array],
    bank: Matrices,
    query: Float[Array, "n c k"],
    gates: Float[Array, "n c r"],
    reads: np.ndarray,
) -> Float[Array, "n c v"]:
    """See ``api.bank_read``."""

    def block(query, gates, reads):
        states = jax.tree.map(lambda matrix: matrix[jnp.maximum(reads, 0)], bank)
        every = jax.vmap(read, in_axes=(0, None))(states, query)
        return jnp.einsum("cr,rcv->cv", jnp.where(reads[None] >= 0, gates, 0), every)

    return jax.vmap(block)(query, gates, jnp.asarray(reads))
