"""Write rules: how a memory is written, and how it is read."""

from memcache_jax.kernels.affine_update import AffineChunk as AffineChunk
from memcache_jax.memories.affine import AffineMemory as AffineMemory
from memcache_jax.memories.base import Control, Memory
from memcache_jax.memories.channel import GLA
from memcache_jax.memories.deep import DeepMemory
from memcache_jax.memories.delta import GDN2, KDA, RWKV7, DeltaNet, GatedDeltaNet
from memcache_jax.memories.dla import DLA
from memcache_jax.memories.matrix import SSD, SWLA, LinearAttention, RetNet
from memcache_jax.memories.titans import Titans
from memcache_jax.memories.vector import Vector

# The rules, and what every rule is made from.
__all__ = [
    "DLA",
    "GDN2",
    "GLA",
    "KDA",
    "RWKV7",
    "SSD",
    "SWLA",
    "Control",
    "DeepMemory",
    "DeltaNet",
    "GatedDeltaNet",
    "LinearAttention",
    "Memory",
    "RetNet",
    "Titans",
    "Vector",
]
