"""Entry point of the grouped read."""

from collections.abc import Callable

from memcache_jax._typing import Array, Float, Int, Matrices
from memcache_jax.kernels._dispatch import choose, implementations

_IMPLEMENTATIONS = implementations("grouped_read", "reference", "xla", "pallas_tpu", "pallas_gpu")


def grouped_read(
    read: Callable[..., Array],
    bank: Matrices,
    query: Float[Array, "b h n c k"],
    gates: Float[Array, "b h n c s"],
    states: Int[Array, "b h n c s"],
    *,
    implementation: str | None = None,
) -> Float[Array, "b h n c v"]:
    """Returns Y_t = sum over s of gates[t, s] read(bank_{states[t, s]}, x_t).

    A state that a row has not chosen reaches neither its output nor a gradient, NaN or not.

    Args:
      read: reads one state: (matrices, rows (c, k)) -> rows (c, v); with gates (c) as a third
        argument, the rows it returns times those.
      bank: the cached states, each matrix (b, h, states, in, out).
      query: the rows x.
      gates: weight of each row's choices.
      states: the states that each row has chosen, -1 for none.
      implementation: ``"xla"``, ``"pallas_tpu"``, ``"pallas_gpu"`` or ``"reference"``; None for
        the fastest on the platform that the program is compiled for.

    Raises:
      ValueError: for an unknown implementation.
      NotImplementedError: if the implementation is missing or cannot take these arguments, with the
        reasons.
    """
    return choose("grouped_read", _IMPLEMENTATIONS, implementation)(
        read, bank, query, gates, states
    )
