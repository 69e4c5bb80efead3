"""Routers trained with noise and a load-balancing loss, on associative recall.

Command:   python -m experiments.routers --config=configs/routers.py --workdir=runs/routers
Hardware:  two CPU cores
Time:      33 minutes on one core of a busy machine; about 11 minutes of processor time
Expected:  accuracy at L = 256, K = 64, mean of two seeds (2026-11-30): 0.29 with neither, 0.30 with
           noise, 0.29 with the loss, 0.27 with both: no gain
"""

from typing import Any

from ml_collections import ConfigDict

from experiments._recall import recall_config


def get_config() -> Any:
    """Returns the configuration: SSD with SSC(2), C = 16, two layers."""
    config = recall_config()
    config.models = ("ssd_ssc",)
    config.test = ((128, 32), (256, 64))
    config.steps, config.seeds, config.at_once = 1000, (0, 1), 2
    config.variants = ConfigDict(
        {
            "neither": {"router_noise": 0.0, "router_loss": 0.0},
            "noise": {"router_noise": 0.5, "router_loss": 0.0},
            "loss": {"router_noise": 0.0, "router_loss": 0.01},
            "both": {"router_noise": 0.5, "router_loss": 0.01},
        }
    )
    return config
