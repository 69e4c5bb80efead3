"""Where a program's model comes from: a training run, or a public model's folder."""

import json
from pathlib import Path

from absl import flags

import memcache_jax as mc
from memcache_jax.training import load_model
from memcache_jax.training.tokenizers import FileTokenizer, Tokenizer

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of a training run.")
_PRETRAINED = flags.DEFINE_string(
    "pretrained", None, "The folder of a public model, with its tokenizer.json."
)
_SEGMENT = flags.DEFINE_integer(
    "segment", None, "Gives a public model caches of segments of this many tokens."
)


def read_model() -> tuple[mc.nn.LanguageModel, Tokenizer]:
    """Returns the model that the flags name, and its tokenizer.

    Raises:
      ValueError: unless they name one, or if it cannot be read.
    """
    workdir, pretrained, segment = _WORKDIR.value, _PRETRAINED.value, _SEGMENT.value
    if workdir is not None and pretrained is None:
        if segment is not None:
            raise ValueError("--segment is for --pretrained: a run's model has its own caches")
        model, tokenizer, _ = load_model(workdir)
        return model, tokenizer
    if pretrained is not None and workdir is None:
        model = mc.pretrained.load(pretrained)
        if segment is not None:
            model = mc.nn.with_memory_caching(model, segmentation=mc.Constant(segment))
        return model, read_tokenizer(Path(pretrained))
    raise ValueError("give --workdir, of a training run, or --pretrained, of a public model")


def source() -> Path:
    """The folder that the flags name."""
    return Path(_WORKDIR.value or _PRETRAINED.value or "")


def read_tokenizer(folder: Path) -> FileTokenizer:
    """Returns a public model's tokenizer, which ends documents with the token it names."""
    options = folder / "tokenizer_config.json"
    token = None
    if options.is_file():
        token = json.loads(options.read_text()).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
    return FileTokenizer(folder / "tokenizer.json", eos_token=token)
