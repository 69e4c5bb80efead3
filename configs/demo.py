"""Titans with gated residual memory learns Python from the standard library, byte by byte.

Command:   make demo, or
           python -m experiments.train --config=configs/demo.py --workdir=runs/demo
Hardware:  two CPU cores
Time:      5 to 10 minutes, installation and compilation included
Expected:  2.1 bits per byte on held-out files (2.097 on 2026-11-21, in 5m31s)
"""

import os
import sysconfig
from typing import Any

from memcache_jax.training import default_config

# Leaves out tests, vendored tools, and tables such as encodings and topics.
EXCLUDED = (
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
)


def get_config() -> Any:
    """Returns the configuration."""
    config = default_config()
    config.resume = True  # an interrupted run resumes
    config.steps, config.batch_size, config.sequence_length = 240, 4, 512
    config.log_every, config.eval_every, config.checkpoint_every = 10, 100, 100

    config.model.num_layers, config.model.features, config.model.num_heads = 3, 192, 3
    config.model.memory.update(chunk_size=32, expansion=2)
    config.model.segmentation.size = 128
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 2e-3, 30

    config.data.files = (os.path.join(sysconfig.get_paths()["stdlib"], "**", "*.py"),)
    config.data.exclude = tuple(f"*/{name}/*" for name in EXCLUDED)
    config.data.heldout_tokens = 32_768
    config.sample.prompt = "class Node:\n    def __init__(self"
    config.sample.max_new_tokens, config.sample.temperature = 128, 0.7
    config.sample.every = 60  # the first one after a minute or two
    return config
