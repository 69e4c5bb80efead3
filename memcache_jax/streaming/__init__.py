"""Streams: caches that carry a sequence on, any number of tokens at a time."""

from memcache_jax.streaming.cache import (
    Cache,
    CacheConfig,
    Placement,
    Policy,
    check_options,
    init_cache,
)
from memcache_jax.streaming.extend import extend

__all__ = ["Cache", "CacheConfig", "Placement", "Policy", "check_options", "extend", "init_cache"]
