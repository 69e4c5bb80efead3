"""The report of a run: its sample."""

import numpy as np
from flax import nnx

from memcache_jax.nn import LanguageModel
from memcache_jax.training import report
from memcache_jax.training.models import model_config
from memcache_jax.training.tokenizers import ByteTokenizer


def test_a_sample_is_as_long_as_listed_segments_allow(config, monkeypatch):
    config.model.mixers = ("memory_caching",)
    config.model.memory = {"name": "LinearAttention"}
    config.model.segmentation = {"name": "Lengths", "lengths": (16, 16)}
    model = nnx.eval_shape(lambda: LanguageModel(model_config(config.model), rngs=nnx.Rngs(0)))
    asked = []

    def generate(model, prompt, max_new_tokens, **options):
        asked.append((prompt.shape[1], max_new_tokens))
        return np.asarray(prompt)

    monkeypatch.setattr(report, "generate", generate)
    for prompt, count in (("3 apples", 256), ("3 apples", 5), ("3 apples " * 9, 256)):
        config.sample.prompt, config.sample.max_new_tokens = prompt, count
        assert prompt.startswith(report.sample(config, model, ByteTokenizer()))
    # 32 tokens are read; the last one is drawn alone.
    assert asked == [(8, 25), (8, 5), (32, 1)]
