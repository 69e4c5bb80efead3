"""The grouped read as its equation: every row reads each of the states it has chosen."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from memcache_jax._typing import Array, Float, Int, Matrices


def grouped_read(
    read: Callable[..., Array],
    bank: Matrices,
    query: Float[Array, "b h n c k"],
    gates: Float[Array, "b h n c s"],
    states: Int[Array, "b h n c s"],
) -> Float[Array, "b h n c v"]:
    """See ``api.grouped_read``."""

    def unit(bank, query, gates, states):
        def row(query, gates, states):
            there = states >= 0
            chosen = jax.tree.map(
                lambda matrix: jnp.where(there[:, None, None], matrix[states], 0), bank
            )
            every = jax.vmap(read, in_axes=(0, None))(chosen, query[None])[:, 0]
            return jnp.einsum("s,sv->v", jnp.where(there, gates, 0), every)

        return jax.vmap(jax.vmap(row))(query, gates, states)

    return jax.vmap(jax.vmap(unit))(bank, query, gates, states)
