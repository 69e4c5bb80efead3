"""All presets of size 340m; the part after the colon is one of ``mc.presets.NAMES``.

Command:   python -m experiments.train --config=configs/lm_340m.py:titans_grm \
               --config.data.files=FOLDER --config.data.tokenizer=FILE \
               --workdir=runs/titans_grm_340m
Hardware:  a slice of a TPU pod
Time:      not measured
Expected:  not run yet.
"""

from typing import Any

from memcache_jax.training import preset_config


def get_config(name: str = "titans_grm") -> Any:
    """Returns the configuration."""
    return preset_config(name, "340m")
