"""How many pairs each memory recalls, without training.

Command:   python -m experiments.capacity --config=configs/capacity.py --workdir=runs/capacity
Hardware:  two CPU cores
Time:      about two and a half minutes of one core on a busy machine
Expected:  on 2026-11-29, with random keys of d = 16: a linear memory recalls 0.9 or more of 16
           pairs and 0.30 of 64, with GRM and segments of 16 pairs 0.45; attention recalls all.
"""

from typing import Any

from ml_collections import ConfigDict


def get_config() -> Any:
    """Returns the configuration: every rule alone, and two of them with caches."""
    config = ConfigDict()
    config.dim = 16
    config.pairs = 256
    config.trials = 16
    config.questions = 32
    config.temperature = 10.0  # of content gates and attention: what a layer starts with
    config.enough = 0.9  # the recall that counts as holding all pairs
    config.report = 64  # pairs at which the table has the recall, beside all
    # Kinds of keys: a name, the mean product of two of a topic, pairs in a row of one, 0 for all.
    config["keys"] = (("random", 0.0, 0), ("one topic", 0.3, 0), ("topics of 16", 0.5, 16))
    config.rules = (
        *("LinearAttention", "RetNet", "SSD", "GLA", "SWLA", "DeltaNet", "GatedDeltaNet"),
        *("KDA", "GDN2", "RWKV7", "DLA", "Titans"),
    )
    config.alone_every = 16
    config.cached_rules = ("LinearAttention", "DeltaNet")
    config.segments = (8, 16, 64)
    config.aggregations = ("GRM", "SSC")
    config.top_k = (1, 4)
    config.exact = (4, 16)  # tokens kept beside each state of GRM, at most half a segment
    config.num_keys = (1, 4)  # pooled keys per state, for GRM and SSC
    # Routers: the number of pairs, and of pooled keys per state; one key per pair comes on top.
    config.router_pairs = 1024
    config.router_keys = (1, 2, 4, 8)
    config.router_top_k = (1, 4)
    # Routers that search a tree: branching and beam, and the numbers of states.
    config.trees = ((16, 4), (16, 16), (4, 4))
    config.tree_states = (64, 1024, 4096)
    config.tree_segment = 8
    config.tree_top_k = 4
    config.tree_trials = 8
    config.tree_keys = (
        *(("random", 0.0, 0), ("topics of 16", 0.5, 16), ("topics of 256", 0.5, 256)),
    )
    config.seed = 0
    # Segmentations to compare where topics have so many pairs.
    config.borders = (
        *({"name": "Constant", "size": size} for size in (8, 16, 32)),
        {"name": "Adaptive", "min": 8, "max": 32, "block": 8},
        {"name": "Adaptive", "min": 8, "max": 32, "block": 4},
        {"name": "Adaptive", "min": 8, "max": 32, "block": 2, "threshold": 0.7},
    )
    # Segmentations compared by the recall of DeltaNet with this beta, and GRM.
    config.recall_borders = (
        {"name": "Constant", "size": 20},
        {"name": "Adaptive", "min": 8, "max": 32, "block": 2, "threshold": 0.7},
        {"name": "Adaptive", "min": 8, "max": 32, "block": 2, "threshold": 0.3, "by": "errors"},
    )
    config.recall_beta = 1.0
    config.topic_pairs = (8, 32)
    config.topic_correlations = (0.3, 0.5, 0.7)
    return config
