"""All presets of size 760m; the part after the colon is one of ``mc.presets.NAMES``.

Command:   python -m experiments.train --config=configs/lm_760m.py:titans_grm \
               --config.data.files=FOLDER --config.data.tokenizer=FILE \
               --workdir=runs/titans_grm_760m
Hardware:  a TPU pod
Time:      not measured
Expected:  Table 1 of the paper, average of the commonsense tasks: titans 51.56, titans_grm 52.55,
           dla_grm 51.41, swla_grm 51.26, transformer 49.64. Not run by us.
"""

from typing import Any

from memcache_jax.training import preset_config


def get_config(name: str = "titans_grm") -> Any:
    """Returns the configuration."""
    return preset_config(name, "760m")
