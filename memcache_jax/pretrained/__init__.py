"""Public recurrent checkpoints: read into a ``LanguageModel``, and written back."""

from memcache_jax.pretrained.families import FAMILIES
from memcache_jax.pretrained.read import load
from memcache_jax.pretrained.write import save

__all__ = ["FAMILIES", "load", "save"]
