"""Our layers in the models and trainers of others; no file imports its host."""

from memcache_jax.nn.adapters.gemma import GemmaAttention
from memcache_jax.nn.adapters.maxtext import MaxTextAttention
from memcache_jax.nn.adapters.tunix import TunixModel

__all__ = ["GemmaAttention", "MaxTextAttention", "TunixModel"]
