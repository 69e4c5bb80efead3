"""All presets of size tiny; the part after the colon is one of ``mc.presets.NAMES``.

Command:   python -m experiments.train --config=configs/lm_tiny.py:titans_grm \
               --config.data.files=FOLDER --workdir=runs/titans_grm_tiny
Hardware:  one accelerator, or patience on a CPU
Time:      not measured
Expected:  not run yet.
"""

from typing import Any

from memcache_jax.training import preset_config


def get_config(name: str = "titans_grm") -> Any:
    """Returns the configuration."""
    return preset_config(name, "tiny")
