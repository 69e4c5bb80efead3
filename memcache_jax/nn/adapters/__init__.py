"""Our layers in the models and trainers of others; each file is one host, and imports none."""

from memcache_jax.nn.adapters.gemma import GemmaAttention, GemmaCache
from memcache_jax.nn.adapters.maxtext import MaxTextAttention
from memcache_jax.nn.adapters.tunix import TunixCache, TunixModel

__all__ = ["GemmaAttention", "GemmaCache", "MaxTextAttention", "TunixCache", "TunixModel"]
