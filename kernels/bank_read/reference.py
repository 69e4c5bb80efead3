"""The gated bank read as its equation: every block reads each of its states, and gates weigh."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Float, Matrices


def bank_read(
    read: Callable[..., Array],
    bank: Matrices,
    query: Float[Array, "b h n c k"],
    gates: Float[Array, "b h n c r"],
    reads: np.ndarray | Array,
) -> Float[Array, "b h n c v"]:
    """See ``api.bank_read``."""

    def unit(bank, query, gates, reads):
        def block(query, gates, reads):
            there = reads >= 0
            states = jax.tree.map(
                lambda matrix: jnp.where(there[:, None, None], matrix[reads], 0), bank
            )
            every = jax.vmap(read, in_axes=(0, None))(states, query)
            return jnp.einsum("cr,rcv->cv", jnp.where(there[None], gates, 0), every)

        return jax.vmap(block)(query, gates, reads)

    heads = jax.vmap(unit, in_axes=(0, 0, 0, None))
    rows = jax.vmap(heads, in_axes=(0, 0, 0, 0 if reads.ndim == 3 else None))
    return rows(bank, query, gates, jnp.asarray(reads))
