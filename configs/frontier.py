"""Cache components at equal cache bytes and training steps: recall, needles and text.

Command:   python -m experiments.frontier --config=configs/frontier.py --workdir=runs/frontier
           one part: --config.parts="('recall',)"
Hardware:  two CPU cores
Time:      more than an hour: three seeds of a model in recall take 10 minutes of a core or more
Expected:  on 2026-11-29, at L = 256, K = 64: GRM with C = 16 0.23, with int8 states and C = 6 0.80
           (one seed), attention 1.00; the other parts and models have not been run.
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
            "bfloat16 cache": {"cache": {"cache_dtype": "bfloat16"}, "segmentation": constant},
            "gated delta rule, int8 cache": {
                "memory": {"name": "GatedDeltaNet"},
                "cache": {"cache_dtype": "int8"},
                "segmentation": constant,
            },
            "SSD alone": {
                "aggregation": {"name": "Residual"},
                "segmentation": {"name": "Constant", "size": 2**30},
            },
            "gated delta rule": {"memory": {"name": "GatedDeltaNet"}},
            "SSC, k = 2": {"aggregation": {"name": "SSC", "top_k": 2}},
            "4 keys": {"aggregation": {"name": "GRM", "num_keys": 4}, "segmentation": constant},
            "2 exact tokens": {
                "aggregation": {"name": "GRM", "exact": 2},
                "segmentation": constant,
            },
            "adaptive": {
                "segmentation": {"name": "Adaptive", "min": 16, "max": 32, "block": 8},
            },
        }
    )
    needles = config.needles = needle_config()
    needles.lengths, needles.depths, needles.test_examples = (1024, 2048, 4096), 3, 32
    needles.steps, needles.seeds = 400, (0, 1, 2)
    needles.at_once, needles.workers = 3, 2
    text = config.text = extrapolate.get_config("cpu")
    text.seeds = (0, 1, 2)
    text.training.steps = 200
    # The first model's mixer, and attention with positions.
    text.first = ConfigDict(
        {
            "memory": {"name": "SSD"},
            "aggregation": {"name": "GRM"},
            "segmentation": {"name": "Constant", "size": 64},  # as its heads
        }
    )
    text.changes = ConfigDict(
        {
            "adaptive": {
                "segmentation": {"name": "Adaptive", "min": 64, "max": 128, "block": 32},
            },
            "attention": {"mixers": ("attention",)},
        }
    )
    return config
