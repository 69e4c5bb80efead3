"""demo.py with memory caching in one of three blocks, sliding-window attention in the others.

Command:   python -m experiments.train --config=configs/hybrid_demo.py --workdir=runs/hybrid_demo
Hardware:  two CPU cores
"""

from typing import Any

from configs import demo


def get_config() -> Any:
    """Returns the configuration."""
    config = demo.get_config()
    config.model.mixers = ("sliding_window", "memory_caching", "sliding_window")
    config.model.window = 128
    return config
