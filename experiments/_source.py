"""Where a program's model comes from: a training run, or a public model's folder."""

from pathlib import Path
from typing import Any

from absl import flags

import memcache_jax as mc
from experiments._public import PRETRAINED, SEGMENT, read_public
from memcache_jax.training import load_model
from memcache_jax.training.tokenizers import Tokenizer

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of a training run.")


def read_model() -> tuple[mc.nn.LanguageModel, Tokenizer]:
    """Returns the model that the flags name, and its tokenizer.

    Raises:
      ValueError: unless they name one, or if it cannot be read.
    """
    model, tokenizer, _ = read_source()
    return model, tokenizer


def read_source() -> tuple[mc.nn.LanguageModel, Tokenizer, Any]:
    """As ``read_model``, and the run's configuration; None for a public model."""
    if is_public():
        return *read_public(), None
    return load_model(_WORKDIR.value or "")


def is_public() -> bool:
    """Whether the flags name a public model's folder, not a run's workdir; nothing is read.

    Raises:
      ValueError: unless they name one of both, or for caches of a run's model.
    """
    if (_WORKDIR.value is None) == (PRETRAINED.value is None):
        raise ValueError("give --workdir, of a training run, or --pretrained, of a public model")
    if SEGMENT.value is not None and PRETRAINED.value is None:
        raise ValueError("--segment is for --pretrained: a run's model has its own caches")
    return PRETRAINED.value is not None


def source() -> Path:
    """The folder that the flags name."""
    return Path(_WORKDIR.value or PRETRAINED.value or "")
