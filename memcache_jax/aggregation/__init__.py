"""How a token's reads of its live memory and of the cached ones become one output."""

from memcache_jax.aggregation.base import Aggregation
from memcache_jax.aggregation.grm import GRM, Soup
from memcache_jax.aggregation.residual import Residual
from memcache_jax.aggregation.ssc import SSC

__all__ = ["GRM", "SSC", "Aggregation", "Residual", "Soup"]
