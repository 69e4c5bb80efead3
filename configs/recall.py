"""Associative recall in minutes: a decayed linear and a deep memory, with and without caches.

Command:   make recall, or
           python -m experiments.mqar --config=configs/recall.py --workdir=runs/recall
           python -m experiments.mqar --config=configs/recall.py:deep --workdir=runs/recall_deep
Hardware:  two CPU cores
Time:      15 minutes
Expected:  means of two seeds on 2026-11-22: at L = 256 and K = 64, SSD alone 0.03, with GRM 0.45,
           with SSC 0.31, attention 1.00; at L = 128 and K = 32, DLA alone 0.02, with GRM 0.50,
           with SSC 0.40
"""

from typing import Any

from experiments._recall import recall_config


def get_config(rule: str = "linear") -> Any:
    """Returns the configuration for ``"linear"`` memories (SSD) or a ``"deep"`` one (DLA)."""
    config = recall_config()
    config.seeds = (0, 1)
    config.at_once = config.workers = 2
    if rule == "linear":
        config.models = ("ssd", "ssd_grm", "ssd_ssc", "attention")
        config.steps = 1000
    elif rule == "deep":
        # Shorter rows: a deep memory needs more steps to learn the task, and slower ones.
        config.models = ("dla", "dla_grm", "dla_ssc")
        config.train = ((16, 4, 0), (32, 8, 0), (64, 16, 0))
        config.test = ((64, 16), (128, 32), (256, 64))
        config.steps = 1500
    else:
        raise ValueError(f'the part after the colon must be "linear" or "deep", got {rule!r}')
    return config
