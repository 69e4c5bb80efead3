"""Associative recall at Zoology's setting (arXiv:2312.04927), for one accelerator.

Command:   python -m experiments.mqar --config=configs/mqar.py --workdir=runs/mqar
Hardware:  one GPU or TPU chip
Time:      not measured
Expected:  not run yet.
"""

from typing import Any

from experiments._recall import recall_config

RULES = ("linear", "swla", "gated_deltanet", "dla", "titans")
VARIANTS = ("", "_residual", "_grm", "_soup", "_ssc", "_log_linear")
EPOCHS = 32


def get_config() -> Any:
    """Returns the configuration."""
    config = recall_config()
    config.models = ("transformer", *(rule + variant for rule in RULES for variant in VARIANTS))
    config.widths = (64, 128)
    config.learning_rates = (1e-3, 10**-2.5, 1e-2, 10**-1.5)
    config.seeds = (0, 1, 2)
    config.at_once = 6
    config.head_dim, config.segment, config.top_k = 32, 16, 4
    config.vocab_size = 8192
    # A source per 20,000 examples, so that updates use all examples in proportion.
    config.train = ((64, 4, 20_000),) * 5 + tuple(
        (length, pairs, 20_000) for length, pairs in ((128, 8), (256, 16), (256, 32), (256, 64))
    )
    config.test = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
    config.test_examples = 1000
    config.batch_size = 256
    config.steps = EPOCHS * 180_000 // config.batch_size
    config.warmup_steps = 1000
    return config
