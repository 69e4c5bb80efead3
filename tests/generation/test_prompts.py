"""Token ids that are refused, and sizes of buffers."""

import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from memcache_jax.generation.prompts import buffer_size, longest, segmentations
from tests.generation.models import count_up, language_model


def test_sizes_of_buffers():
    assert [buffer_size(tokens) for tokens in (1, 64, 65, 129)] == [64, 64, 128, 256]
    assert [buffer_size(tokens, 96) for tokens in (1, 64, 65, 96, 97)] == [64, 64, 96, 96, 97]
    assert longest(language_model("listed")) == 96
    assert longest(language_model("titans")) is longest(count_up) is None


def test_segments_of_layers_that_consist_of_several():
    """The buffer of a short prompt is no longer than the segments of a layer's part."""
    listed = mc.nn.MemoryCachingMixer(mc.memories.SSD(), segmentation=mc.Lengths((8, 12)))
    mixers = (
        mc.nn.ParallelMixer(mc.nn.AttentionMixer(), mc.nn.MemoryAsContextMixer(listed)),
        mc.nn.MemoryAsContextMixer(mc.nn.MemoryCachingMixer(segmentation=mc.Constant(64))),
    )
    config = mc.nn.LanguageModelConfig(9, 2, features=8, num_heads=2, mixers=mixers)
    model = nnx.eval_shape(lambda: mc.nn.LanguageModel(config, rngs=nnx.Rngs(0)))
    assert longest(model) == 20
    assert segmentations(model) == [listed.segmentation, mc.Constant(64)]


def test_ids_without_a_vocabulary_must_be_int32():
    with pytest.raises(ValueError, match=r"prompt must hold .* got 4294967296"):
        mc.generate(count_up, np.array([[2**32]]), 2, temperature=0)
