"""A task, a loss and options for training loops that are not ours."""

import jax
import jax.numpy as jnp
import optax

import memcache_jax as mc

VOCAB, FEATURES, HEADS = 16, 32, 2
OPTIONS = {
    "linear attention, residual": {
        "memory": mc.memories.LinearAttention(),
        "aggregation": mc.Residual(),
        "segmentation": mc.Constant(8),
    },
    "titans, grm": {
        "memory": mc.memories.Titans(chunk_size=4),
        "aggregation": mc.GRM(),
        "segmentation": mc.Constant(8),
    },
}


def repeating_tokens(length=25):
    """Rows that repeat a random word, so that a model without memory cannot tell what follows."""
    word = jax.random.randint(jax.random.key(0), (4, 10), 0, VOCAB)
    return jnp.tile(word, (1, -(-length // 10)))[:, :length]


def cross_entropy(logits, tokens):
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()
