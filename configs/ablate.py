"""Memory caching with one part changed at a time, on associative recall.

Command:   python -m experiments.ablate --config=configs/ablate.py --workdir=runs/ablate, or
           --config=configs/ablate.py:titans for another rule
Hardware:  two CPU cores
Time:      65 minutes on a busy machine
Expected:  at L = 256 and K = 64, means of two seeds on 2026-11-22: SWLA with GRM 0.28, with
           segments of 8 tokens 0.74, of 32 0.13, without caches 0.14. Other rules: not run yet.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments._recall import recall_config


def get_config(rule: str = "swla") -> Any:
    """Returns the configuration for a write rule of ``mc.presets``."""
    config = recall_config()
    config.models = (f"{rule}_grm",)
    config.steps = 1000
    config.seeds = (0, 1)
    config.at_once = config.workers = 2
    # For each variant, the keys of config.model that it replaces.
    config.changes = ConfigDict(
        {
            "gates by position": {"aggregation": {"name": "GRM", "gate": "position"}},
            "no gates": {"aggregation": {"name": "Residual"}},
            "linear memory": {"memory": {"name": "LinearAttention"}},
            "connector = query": {"connector": "query"},
            "no caches": {
                "aggregation": {"name": "Residual"},
                "segmentation": {"name": "Constant", "size": 2**30},
            },
            "soup": {"aggregation": {"name": "Soup"}},
            "SSC, k = 1": {"aggregation": {"name": "SSC", "top_k": 1}},
            "SSC, k = 2": {"aggregation": {"name": "SSC", "top_k": 2}},
            "SSC, k = 4": {"aggregation": {"name": "SSC", "top_k": 4}},
            "states of the layer before": {"mixers": ("memory_caching", "previous_states")},
            "checkpoint starts": {"start": "checkpoint"},
            "sums of keys": {"aggregation": {"name": "GRM", "pooling": "sum"}},
            "C = 8": {"segmentation": {"name": "Constant", "size": 8}},
            "C = 32": {"segmentation": {"name": "Constant", "size": 32}},
            "logarithmic": {"segmentation": {"name": "Logarithmic", "size": 16}},
        }
    )
    if rule in ("titans", "dla"):
        for size in (2, 4, 8):
            memory = {"name": {"titans": "Titans", "dla": "DLA"}[rule], "chunk_size": size}
            config.changes[f"chunks of {size}"] = {"memory": memory}
    return config
