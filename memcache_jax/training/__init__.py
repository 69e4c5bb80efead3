"""Training: data, tokenizers and the training loop."""

from memcache_jax.training.checkpoint import CheckpointError, load_model
from memcache_jax.training.config import default_config, model_config
from memcache_jax.training.loop import StoppedError, train

__all__ = [
    "CheckpointError",
    "StoppedError",
    "default_config",
    "load_model",
    "model_config",
    "train",
]
