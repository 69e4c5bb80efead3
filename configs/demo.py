"""A small Titans with gated residual memory on the Python standard library, byte by byte.

Command: make demo, or python -m experiments.train --config=configs/demo.py --workdir=runs/demo
"""

import os
import sysconfig

from ml_collections import ConfigDict

from memcache_jax.training import default_config


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = default_config()
    config.steps = 220
    config.log_every, config.eval_every, config.checkpoint_every = 5, 55, 55
    config.resume = True  # an interrupted run goes on
    config.model.num_layers, config.model.features, config.model.num_heads = 3, 192, 3
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 2e-3, 20
    config.data.files = (os.path.join(sysconfig.get_paths()["stdlib"], "**", "*.py"),)
    config.data.exclude = tuple(
        f"*/{name}/*"
        for name in (
            "site-packages",
            "dist-packages",
            "test",
            "tests",
            "idlelib",
            "lib2to3",
            "turtledemo",
            "ensurepip",
            "__pycache__",
        )
    )
    config.sample.prompt = "class "
    return config
