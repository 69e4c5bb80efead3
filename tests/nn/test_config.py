"""Configurations of a language model that are refused."""

import dataclasses

import pytest

import memcache_jax as mc

CACHING = mc.nn.MemoryCachingMixer(
    mc.memories.Titans(chunk_size=4, expansion=2), mc.GRM(), mc.Constant(8)
)
CONFIG = mc.nn.LanguageModelConfig(
    vocab_size=19, num_layers=4, features=16, num_heads=2, mixers=(CACHING,)
)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_layers=0), "num_layers must be at least 1, got 0"),
        (dict(mlp_features=-1), "mlp_features must be at least 0, got -1"),
        (dict(mixers=()), "multiple of the number of mixers, got 0"),
        (dict(mixers=(CACHING,) * 3), "num_layers=4 must be a multiple .* got 3"),
    ],
)
def test_configurations_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
