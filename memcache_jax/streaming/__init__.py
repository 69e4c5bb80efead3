"""Streams: caches that carry a sequence on, any number of tokens at a time."""

from memcache_jax.streaming.cache import Cache, init_cache
from memcache_jax.streaming.config import CacheConfig, check_options
from memcache_jax.streaming.eviction import Eviction
from memcache_jax.streaming.extend import extend
from memcache_jax.streaming.storage import Placement

__all__ = ["Cache", "CacheConfig", "Eviction", "Placement", "check_options", "extend", "init_cache"]
