"""A public model gets a memory, and learns which of its segments to read.

Command:   python -m experiments.train --config=configs/pretrained.py \
               --config.pretrained=FOLDER --config.data.files=TEXT --workdir=DIR
           --config.tune=lora also trains adapters of its projections, --config.tune=all everything
Hardware:  one accelerator that holds the model; or a pod, with --config.mesh.fsdp=-1
Time:      not measured
Expected:  not run at a real size.
"""

from typing import Any

from memcache_jax.training import default_config


def get_config() -> Any:
    """Returns the configuration."""
    config = default_config()
    config.resume = True
    config.tune = "caches"
    config.steps, config.batch_size, config.sequence_length = 1000, 8, 8192
    config.model.segmentation.size = 1024  # a sequence has eight segments
    config.model.dtype, config.model.remat = "bfloat16", True
    config.data.tokenizer = "pretrained"
    config.optimizer.learning_rate = 1e-3  # of connectors and adapters; 1e-5 is usual for "all"
    return config
