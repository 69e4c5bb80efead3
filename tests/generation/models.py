"""Models to generate with."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

import memcache_jax as mc

VOCAB = 23
MIXERS = {
    "linear attention": mc.nn.MemoryCachingMixer(
        memory=mc.memories.LinearAttention(), segmentation=mc.Constant(16)
    ),
    "titans": mc.nn.MemoryCachingMixer(
        memory=mc.memories.Titans(chunk_size=8), segmentation=mc.Constant(16)
    ),
    "attention": mc.nn.AttentionMixer(),
    "listed": mc.nn.MemoryCachingMixer(
        memory=mc.memories.LinearAttention(), segmentation=mc.Lengths((48, 48))
    ),
}


@functools.cache
def language_model(mixer="linear attention"):
    config = mc.nn.LanguageModelConfig(
        vocab_size=VOCAB, num_layers=2, features=16, num_heads=2, mixers=(MIXERS[mixer],)
    )
    model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
    # An untrained model's logits are nearly equal: make its choices clear.
    model.head.kernel[...] = 20 * model.head.kernel[...]
    return model


def prompts(batch=3, length=5):
    return jax.random.randint(jax.random.key(1), (batch, length), 0, VOCAB)


@functools.cache
def always(*probabilities):
    """A model whose next token has the same distribution everywhere."""
    logits = jnp.log(jnp.asarray(probabilities))
    return lambda tokens: jnp.broadcast_to(logits, (*tokens.shape, logits.shape[0]))


def count_up(tokens):
    """A model that is sure of the token before, plus one, modulo 10."""
    return 50.0 * jax.nn.one_hot((tokens + 1) % 10, 10)
