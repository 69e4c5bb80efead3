"""Cache components at equal cache bytes and training steps: recall, needles and text.

Command:   python -m experiments.frontier --config=configs/frontier.py --workdir=runs/frontier
           one part: --config.parts="('needles',)"
Hardware:  two CPU cores
Time:      an hour on two idle cores, from 114 minutes of processor time on two busy ones
Expected:  means of three seeds (2026-11-30), accuracy at L = 256, K = 64 and needles found at 4,096
           tokens: GRM with C = 16 0.20 and 0.39, int8 states with four keys and C = 12 0.88 and
           0.89, attention 1.00 and 0.71. On text no cache helps after 200 steps.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import extrapolate
from experiments._recall import recall_config
from experiments.needle import needle_config


def get_config() -> Any:
    """Returns the configuration: SSD with GRM and C = 16, whose bytes bound all but attention."""
    config = recall_config()
    config.models = ("ssd_grm",)
    config.vocab_size = 544  # rows of 512 tokens
    config.train = ((32, 8, 0), (64, 16, 0), (128, 32, 0))
    config.test = ((256, 32), (256, 64), (512, 64))
    config.steps = 1000
    config.seeds = (0, 1, 2)
    config.at_once, config.workers = 3, 2
    config.parts = ("recall", "needles", "text")
    config.target, config.settled = "256/64", 0.05
    config.against, config.unbounded = "attention", ("attention",)
    constant = {"name": "Constant"}  # gets the smallest size that keeps within the bytes
    config.changes = ConfigDict(
        {
            "attention": {
                "memory": {"name": "Vector"},
                "aggregation": {"name": "GRM"},
                "segmentation": {"name": "Constant", "size": 1},
            },
            "int8 cache": {"cache": {"cache_dtype": "int8"}, "segmentation": constant},
            "gated delta rule, int8 cache": {
                "memory": {"name": "GatedDeltaNet"},
                "cache": {"cache_dtype": "int8"},
                "segmentation": constant,
            },
            "4 keys, int8 cache": {
                "aggregation": {"name": "GRM", "num_keys": 4},
                "cache": {"cache_dtype": "int8"},
                "segmentation": constant,
            },
            "no caches": {
                "aggregation": {"name": "Residual"},
                "segmentation": {"name": "Constant", "size": 2**30},
            },
            "SSC, k = 2": {"aggregation": {"name": "SSC", "top_k": 2}},
            "4 keys": {"aggregation": {"name": "GRM", "num_keys": 4}, "segmentation": constant},
            "2 exact tokens": {
                "aggregation": {"name": "GRM", "exact": 2},
                "segmentation": constant,
            },
        }
    )
    needles = config.needles = needle_config()
    needles.lengths, needles.depths, needles.test_examples = (1024, 2048, 4096), 3, 16
    needles.steps, needles.seeds = 400, (0, 1, 2)
    needles.at_once, needles.workers = 3, 2
    text = config.text = extrapolate.get_config("cpu")
    text.seeds, text.training.steps = (0, 1, 2), 200
    # The first model's mixer, and attention with positions.
    text.first = ConfigDict(
        {
            "memory": {"name": "SSD"},
            "aggregation": {"name": "GRM"},
            "segmentation": {"name": "Constant", "size": 64},  # as its heads
        }
    )
    text.changes = ConfigDict({"attention": {"mixers": ("attention",)}})
    return config
