"""Models and optimizers for one step."""

import dataclasses
from typing import Any

import jax
from ml_collections import ConfigDict

import memcache_jax as mc

OPTIONS: Any = ConfigDict(
    dict(
        learning_rate=0.1,
        warmup_steps=3,
        final_fraction=0.1,
        weight_decay=0.1,
        b1=0.9,
        b2=0.95,
        clip_norm=1.0,
    )
)


def options(**changes) -> Any:
    return ConfigDict({**OPTIONS, **changes})


def attention(**changes):
    config = mc.nn.LanguageModelConfig(
        vocab_size=11,
        num_layers=1,
        features=8,
        num_heads=2,
        mixers=(mc.nn.AttentionMixer(),),
        mlp_features=8,
    )
    return dataclasses.replace(config, **changes)


def titans():
    mixer = mc.nn.MemoryCachingMixer(mc.memories.Titans(4, 2), mc.GRM(), mc.Constant(8))
    return attention(num_layers=2, mixers=(mixer,))


def linear():
    mixer = mc.nn.MemoryCachingMixer(mc.memories.LinearAttention(), mc.GRM(), mc.Constant(8))
    return attention(mixers=(mixer,))


def names(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}
