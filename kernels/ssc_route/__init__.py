"""Routing of tokens to the cached states that they read."""

from memcache_jax.kernels.ssc_route.api import ssc_route

__all__ = ["ssc_route"]
