"""Needles in haystacks: the light version, trained on rows of 64 and 128 tokens.

Command:   python -m experiments.needle --config=configs/needle.py --workdir=runs/needle
           For models of experiments.train, S-NIAH at 4K to 16K tokens:
           --config=configs/needle.py:trained --config.trained="('runs/mine',)"
Hardware:  two CPU cores; one accelerator for trained models
Time:      21 minutes on a busy machine
Expected:  at 1,024 tokens, means of two seeds on 2026-11-22: SSD 0.54 (1.00 and 0.07), with GRM
           0.96, with SSC 0.97, attention 0.80. Trained models: not run yet.
"""

from typing import Any

from experiments.needle import needle_config


def get_config(kind: str = "light") -> Any:
    """Returns the configuration of the ``light`` version, or for ``trained`` models."""
    config = needle_config()
    if kind == "trained":
        config.lengths, config.depths = (4096, 8192, 16384), 10
    elif kind == "light":
        config.at_once = config.workers = 2
        config.seeds = (0, 1)
        config.steps = 600
    else:
        raise ValueError(f'the part after the colon must be "light" or "trained", got {kind!r}')
    return config
