"""Generation: continuing token sequences with a causal model."""

from memcache_jax.generation.decoder import Decoder
from memcache_jax.generation.drafts import DraftModel, NGrams
from memcache_jax.generation.generate import generate
from memcache_jax.generation.rewind_to import rewind_to

__all__ = ["Decoder", "DraftModel", "NGrams", "generate", "rewind_to"]
