"""The report of a run: its sample."""

from flax import nnx

from memcache_jax.nn import LanguageModel
from memcache_jax.training.models import model_config
from memcache_jax.training.report import _sample
from memcache_jax.training.tokenizers import ByteTokenizer


def test_a_sample_is_as_long_as_listed_segments_allow(config):
    config.model.mixers = ("memory_caching",)
    config.model.memory = {"name": "LinearAttention"}
    config.model.segmentation = {"name": "Lengths", "lengths": (16, 16)}
    config.sample.prompt, config.sample.max_new_tokens = "3 apples", 256
    model = LanguageModel(model_config(config.model), rngs=nnx.Rngs(0))
    text = _sample(config, model, ByteTokenizer())
    assert text.startswith("3 apples")
    assert 8 < len(text) <= 33
