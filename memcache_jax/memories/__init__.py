"""Write rules: how a memory is written, and how it is read."""

from typing import Any

from memcache_jax.kernels.affine_update import AffineChunk as AffineChunk
from memcache_jax.memories.affine import AffineMemory as AffineMemory
from memcache_jax.memories.base import Memory
from memcache_jax.memories.channel import GLA
from memcache_jax.memories.control import Control
from memcache_jax.memories.deep import DeepMemory
from memcache_jax.memories.delta import GDN2, KDA, DeltaNet, GatedDeltaNet
from memcache_jax.memories.dla import DLA
from memcache_jax.memories.matrix import SSD, LinearAttention, RetNet
from memcache_jax.memories.rwkv7 import RWKV7
from memcache_jax.memories.titans import Titans
from memcache_jax.memories.vector import Vector
from memcache_jax.memories.window import SWLA

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


def __getattr__(name: str) -> Any:
    among = "Mamba-2 is SSD" if name.lower() == "mamba2" else f"there are {', '.join(__all__)}"
    raise AttributeError(f"memcache_jax.memories has no {name}: {among}")
