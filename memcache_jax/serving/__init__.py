"""Serving: many requests in one cache, and what their prompts share."""

from memcache_jax.serving.batcher import Batcher
from memcache_jax.serving.prefix_store import PrefixStore
from memcache_jax.serving.request import Request

__all__ = ["Batcher", "PrefixStore", "Request"]
