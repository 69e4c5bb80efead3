"""All presets of size 1.3b; the part after the colon is one of ``mc.presets.NAMES``.

Command:   python -m experiments.train --config=configs/lm_1p3b.py:titans_grm \
               --config.data.files=FOLDER --config.data.tokenizer=FILE \
               --workdir=runs/titans_grm_1p3b
Hardware:  a TPU pod
Time:      not measured
Expected:  Table 1 of the paper, average of the commonsense tasks: titans 56.82, titans_grm 58.33,
           dla_grm 55.96, swla_grm 54.60, transformer 53.19. Not run by us.
"""

from typing import Any

from memcache_jax.training import preset_config


def get_config(name: str = "titans_grm") -> Any:
    """Returns the configuration."""
    return preset_config(name, "1.3b")
