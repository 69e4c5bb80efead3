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


def block(heads, hidden=8):
    return mc.nn.BlockConfig(mc.nn.GroupedAttentionMixer(heads, 1, 4), mc.nn.GatedMLP(hidden))


@pytest.mark.parametrize(
    ("heads", "stacks"),
    [
        ([1, 1, 1, 1], [(1, 4)]),
        ([1, 1, 2, 1, 1, 2], [(3, 2)]),
        ([1, 1, 1, 2], [(1, 3), (1, 1)]),
        ([1, 2, 3], [(3, 1)]),
        ([3, 1, 2, 1, 2, 4, 5], [(1, 1), (2, 2), (2, 1)]),
    ],
    ids=str,
)
def test_blocks_are_cut_into_what_repeats(heads, stacks):
    blocks = tuple(map(block, heads))
    config = mc.nn.LanguageModelConfig(
        vocab_size=9, num_layers=len(blocks), features=8, num_heads=2, blocks=blocks
    )
    assert [(len(period), repeats) for period, repeats in config.stacks] == stacks
    flat = [one for period, repeats in config.stacks for _ in range(repeats) for one in period]
    assert tuple(flat) == blocks


def test_blocks_must_be_as_many_as_layers():
    with pytest.raises(ValueError, match="got 2 blocks for num_layers=3"):
        mc.nn.LanguageModelConfig(
            vocab_size=9, num_layers=3, features=8, num_heads=2, blocks=(block(1), block(1))
        )
