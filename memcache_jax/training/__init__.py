"""Training: data, tokenizers and the training loop."""

try:
    from memcache_jax.training.checkpoint import CheckpointError
    from memcache_jax.training.config import default_config
    from memcache_jax.training.distributed import initialize
    from memcache_jax.training.export import load_model
    from memcache_jax.training.loop import train
    from memcache_jax.training.models import model_config, model_options, preset_config
    from memcache_jax.training.signals import StoppedError
except ModuleNotFoundError as e:
    raise ModuleNotFoundError(
        f"memcache_jax.training needs {e.name}: pip install '.[train]' in a checkout of "
        "memcache_jax",
        name=e.name,
    ) from e

__all__ = [
    "CheckpointError",
    "StoppedError",
    "default_config",
    "initialize",
    "load_model",
    "model_config",
    "model_options",
    "preset_config",
    "train",
]
