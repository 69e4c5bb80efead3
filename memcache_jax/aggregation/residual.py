"""The plain sum of all reads."""

import dataclasses

import jax.numpy as jnp

from memcache_jax._typing import Array, Float
from memcache_jax.aggregation.base import Aggregation


@dataclasses.dataclass(frozen=True)
class Residual(Aggregation):
    """The plain sum of all reads (Eq. 7 of arXiv:2602.24281); it needs no connector.

    Example:
      >>> import memcache_jax as mc
      >>> mc.Residual().needs_connector
      False
    """

    def gates(
        self, cached: Float[Array, "... r"], online: Float[Array, "..."]
    ) -> tuple[Float[Array, "... r"], Float[Array, "..."]]:
        """One for every visible state: the exponential of a relevance that is 0 everywhere."""
        return jnp.exp(cached), jnp.exp(online)
