"""Associative recall in minutes: a decayed linear and a deep memory, with and without caches.

Command:   make recall, or
           python -m experiments.mqar --config=configs/recall.py --workdir=runs/recall
Hardware:  two CPU cores
Time:      23 minutes beside other work
Expected:  at L = 256 and K = 64, the means of two seeds on 2026-11-22: SSD alone 0.03, with GRM
           0.43, with SSC 0.34; DLA alone 0.01, with GRM 0.08; attention 1.00
"""

from typing import Any

from experiments._recall import recall_config


def get_config() -> Any:
    """Returns the configuration."""
    config = recall_config()
    config.models = ("ssd", "ssd_grm", "ssd_ssc", "attention", "dla", "dla_grm")
    config.seeds = (0, 1)
    config.at_once = config.workers = 2
    config.steps = 1000
    return config
