"""Entry point of the routing of sparse selective caching."""

import numpy as np

from memcache_jax._typing import Array, Float, Int
from memcache_jax.kernels._dispatch import choose, implementations

_IMPLEMENTATIONS = implementations("ssc_route", "reference", "xla", "pallas_tpu", "pallas_gpu")


def ssc_route(
    connector: Float[Array, "b h n c u"],
    pooled: Float[Array, "b h buckets u"],
    online: Float[Array, "b h n c"],
    reads: np.ndarray,
    top_k: int,
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "b h n c s"], Float[Array, "b h n c"], Int[Array, "b h n c s"]]:
    """Selects the states of highest relevance <u_t, p_i>, and gates them and the online one.

    gamma_t = softmax over the ``top_k`` selected states and the online one (Eq. 16-17 of
    arXiv:2602.24281); ties go to the first in a row of ``reads``, the older state.

    Args:
      connector: the rows u, block by block.
      pooled: the states' pooled keys p.
      online: relevance of the online state.
      reads: (n, r) which states each block may select, each at most once, -1 for an empty slot.
      top_k: states that a token selects, s.
      implementation: ``"xla"``, ``"pallas_tpu"``, ``"pallas_gpu"`` or ``"reference"``; None for
        the fastest on the platform that the program is compiled for.

    Returns:
      The gates of the selected states, the most relevant first; the gate of the online state; and
      the selected states. Where fewer are visible, the gate is zero and the state -1.

    Raises:
      ValueError: for an unknown implementation.
      NotImplementedError: if the implementation is missing or cannot take these arguments, with the
        reasons.
    """
    function = choose("ssc_route", _IMPLEMENTATIONS, implementation)
    return function(connector, pooled, online, reads, top_k)
