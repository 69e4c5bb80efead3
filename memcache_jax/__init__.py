"""Memory Caching (arXiv:2602.24281) in JAX: recurrent sequence models whose memory grows."""

from memcache_jax import memories, nn, presets, pretrained, sharding
from memcache_jax.adaptive import Adaptive
from memcache_jax.aggregation import GRM, Aggregation, Residual, Soup
from memcache_jax.caching import memory_caching
from memcache_jax.gating import Gate
from memcache_jax.generation import Decoder, DraftModel, NGrams, generate, rewind_to
from memcache_jax.segmentation import Constant, Lengths, Logarithmic, ReadPlan, Segmentation
from memcache_jax.serving import Batcher, PrefixStore
from memcache_jax.sparse import SSC
from memcache_jax.streaming import Cache, extend, init_cache
from memcache_jax.streaming.eviction import Eviction
from memcache_jax.tree import Tree

__version__ = "0.2.0"

__all__ = [
    "GRM",
    "SSC",
    "Adaptive",
    "Aggregation",
    "Batcher",
    "Cache",
    "Constant",
    "Decoder",
    "DraftModel",
    "Eviction",
    "Gate",
    "Lengths",
    "Logarithmic",
    "NGrams",
    "PrefixStore",
    "ReadPlan",
    "Residual",
    "Segmentation",
    "Soup",
    "Tree",
    "extend",
    "generate",
    "init_cache",
    "memories",
    "memory_caching",
    "nn",
    "presets",
    "pretrained",
    "rewind_to",
    "sharding",
]
