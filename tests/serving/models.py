"""A model to serve from."""

import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx

import memcache_jax as mc

VOCAB, LENGTH = 23, 60
MIXERS = (mc.nn.MemoryCachingMixer(mc.memories.GatedDeltaNet(), segmentation=mc.Constant(8)),)


@functools.cache
def model():
    config = mc.nn.LanguageModelConfig(VOCAB, 2, features=16, num_heads=2, mixers=MIXERS)
    model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
    # An untrained model's logits are nearly equal: make its choices clear.
    model.head.kernel[...] = 20 * model.head.kernel[...]
    return model


@functools.cache
def spoilt():
    """The same, with logits of NaN after the last token of the vocabulary."""
    spoilt = nnx.clone(model())
    table = spoilt.embedding.embedding
    table[...] = table[...].at[VOCAB - 1].set(jnp.nan)
    return spoilt


def ids(seed=0, count=40):
    return np.random.default_rng(seed).integers(VOCAB - 1, size=count)
