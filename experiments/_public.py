"""The flags that name a public model."""

from pathlib import Path

from absl import flags

import memcache_jax as mc
from memcache_jax.training.tokenizers import FileTokenizer, published_tokenizer

PRETRAINED = flags.DEFINE_string(
    "pretrained", None, "The folder of a public model, with its tokenizer.json."
)
SEGMENT = flags.DEFINE_integer(
    "segment", None, "Gives a public model caches of segments of this many tokens.", 1
)


def read_public() -> tuple[mc.nn.LanguageModel, FileTokenizer]:
    """Returns the public model that the flags name, with caches if they say so; its tokenizer."""
    folder = Path(PRETRAINED.value or "")
    tokenizer = published_tokenizer(folder)  # sooner than gigabytes of weights
    model = mc.pretrained.load(folder)
    if SEGMENT.value is not None:
        model = mc.nn.with_memory_caching(model, segmentation=mc.Constant(SEGMENT.value))
    return model, tokenizer
