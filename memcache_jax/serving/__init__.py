"""Serving: what many prompts share."""

from memcache_jax.serving.prefix_store import PrefixStore

__all__ = ["PrefixStore"]
