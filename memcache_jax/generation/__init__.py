"""Generation: continuing token sequences with a causal model."""

from memcache_jax.generation.decoder import Decoder
from memcache_jax.generation.drafts import DraftModel, NGrams
from memcache_jax.generation.generate import generate

__all__ = ["Decoder", "DraftModel", "NGrams", "generate"]
