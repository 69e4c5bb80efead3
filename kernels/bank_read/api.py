"""Entry point of the gated bank read."""

from collections.abc import Callable

import numpy as np

from memcache_jax._typing import Array, Float, Matrices
from memcache_jax.kernels._dispatch import choose, implementations

_IMPLEMENTATIONS = implementations("bank_read", "reference", "xla", "pallas_tpu", "pallas_gpu")


def bank_read(
    read: Callable[..., Array],
    bank: Matrices,
    query: Float[Array, "b h n c k"],
    gates: Float[Array, "b h n c r"],
    reads: np.ndarray | Array,
    *,
    implementation: str | None = None,
) -> Float[Array, "b h n c v"]:
    """Returns Y_t = sum over the states i that block n reads of gates[t, i] read(bank_i, x_t).

    A state that a block does not read reaches neither its outputs nor a gradient, NaN or not.

    Args:
      read: reads one state: (matrices, rows (c, k)) -> rows (c, v); with gates (c) as a third
        argument, the rows it returns times those.
      bank: the cached states, each matrix (b, h, states, in, out).
      query: the rows x, block by block.
      gates: weight of each row and slot of ``reads``; slots that hold no state are ignored.
      reads: which states each block reads, -1 for an empty slot: (n, r) and static, so that empty
        slots cost nothing, or (b, n, r).
      implementation: ``"xla"``, ``"pallas_tpu"``, whose outputs have the query's dtype,
        ``"pallas_gpu"`` or ``"reference"``; None for the fastest on the platform that the program
        is compiled for.

    Raises:
      ValueError: for an unknown implementation.
      NotImplementedError: if the implementation is missing or cannot take these arguments, with the
        reasons.
    """
    return choose("bank_read", _IMPLEMENTATIONS, implementation)(read, bank, query, gates, reads)
