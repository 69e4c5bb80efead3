"""Mixers, tokens and masks as hosts make them."""

import jax
import jax.numpy as jnp

import memcache_jax as mc

VOCAB, PAD = 16, 0
MIXERS = {
    "memory": mc.nn.MemoryCachingMixer(mc.memories.SSD(), mc.GRM(), mc.Constant(4)),
    "attention": mc.nn.AttentionMixer(),
}


def random_tokens(rows, length, seed=0):
    return jax.random.randint(jax.random.key(seed), (rows, length), 1, VOCAB)


def causal_mask(real):
    """(b, t, t), as Flax's Gemma example and Tunix make it of real tokens (b, t)."""
    return real[:, None] & jnp.tril(jnp.ones((real.shape[1],) * 2, bool))[None]


def positions(real):
    """As both count them: padding does not, and has the number of the token before."""
    place = jnp.cumsum(real, axis=1)
    return place - (place >= 1)


def step_mask(step, tokens, size):
    """(b, 1, size), as both make it for the token at ``step`` of a buffer."""
    pad = jnp.pad(tokens == PAD, ((0, 0), (0, size - tokens.shape[1])))
    return ~(pad | (jnp.arange(size)[None] > step))[:, None]
