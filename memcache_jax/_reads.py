"""Reads of cached states that leave out what a token does not read, whatever it holds."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Float, Matrices
from memcache_jax.gating import finite_rows
from memcache_jax.memories.base import gated


def all_in_order(reads: np.ndarray | Array, bank: Matrices) -> bool:
    """Whether slot i of every block is state i or empty."""
    if not isinstance(reads, np.ndarray) or reads.shape[-1] != bank[0].shape[2]:
        return False
    return not np.any((reads >= 0) & (reads != np.arange(reads.shape[-1])))


def weighted_rows(
    gates: Float[Array, "b h n c r"], rows: Float[Array, "b h r v"]
) -> Float[Array, "b h n c v"]:
    """The sum of all rows by gates; NaN where one that is not finite has a gate."""
    rows, broken = finite_rows(rows)
    broken = jnp.einsum("bhncr,bhr->bhnc", gates, broken.astype(gates.dtype)) > 0
    return jnp.where(broken[..., None], jnp.nan, jnp.einsum("bhncr,bhrv->bhncv", gates, rows))


def blind_where_gates_are_zero(read: Callable[..., Array]) -> Callable[..., Array]:
    """The read, where rows with a gate of zero see nothing of the state, nor do their gradients.

    What goes in is masked as well as what comes out: 0 * NaN is NaN, forward and backward.
    """

    def seen(x: Array, gate: Array) -> Array:
        gate = gate.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(jnp.broadcast_to(gate, x.shape) != 0, x, 0)

    def blind(matrices: Matrices, x: Array, gate: Array | None = None) -> Array:
        if gate is None:
            return read(matrices, x)
        by_any = jnp.max(jnp.abs(gate)) != 0
        matrices = tuple(jnp.where(by_any, matrix, 0) for matrix in matrices)
        # The gate is masked by itself for its own gradient, which is zero where it is.
        return seen(read(matrices, seen(x, gate), seen(gate, gate)), gate)

    return blind


def read_matrix(
    matrices: Matrices, x: Float[Array, "rows in"], gate: Float[Array, "rows"] | None = None
) -> Float[Array, "rows out"]:
    """The read of a single matrix."""
    return jnp.matmul(gated(gate, x), matrices[0])
