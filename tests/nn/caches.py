"""Layers and models with caches, and ragged calls that stream rows through them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import memcache_jax as mc

LENGTH, FEATURES, HEADS = 37, 16, 2
LAYERS = {
    "grm": lambda rngs: caching(rngs, mc.memories.Titans(chunk_size=4), mc.GRM()),
    "query": lambda rngs: caching(
        rngs, mc.memories.GatedDeltaNet(), mc.SSC(top_k=2), connector="query"
    ),
    "position": lambda rngs: caching(
        rngs, mc.memories.RetNet(), mc.GRM(gate="position"), mc.Logarithmic(4)
    ),
    "attention": lambda rngs: mc.nn.Attention(FEATURES, HEADS, rngs=rngs),
    "window": lambda rngs: mc.nn.Attention(FEATURES, HEADS, window=5, rngs=rngs),
    "window of one": lambda rngs: mc.nn.Attention(FEATURES, HEADS, window=1, rngs=rngs),
}
HOST = (
    mc.nn.MemoryCachingMixer(
        memory=mc.memories.SSD(), aggregation=mc.SSC(top_k=2), segmentation=mc.Constant(8)
    ),
)


def caching(rngs, memory, aggregation, segmentation: Any = None, **options):
    return mc.nn.MemoryCaching(
        FEATURES,
        HEADS,
        memory=memory,
        aggregation=aggregation,
        segmentation=segmentation or mc.Constant(8),
        rngs=rngs,
        **options,
    )


def inputs(batch=3):
    return jax.random.normal(jax.random.key(0), (batch, LENGTH, FEATURES))


def language_model(**changes):
    config: dict[str, Any] = dict(
        vocab_size=23,
        num_layers=4,
        features=FEATURES,
        num_heads=HEADS,
        mixers=(
            mc.nn.MemoryCachingMixer(
                memory=mc.memories.GatedDeltaNet(), segmentation=mc.Constant(8)
            ),
            mc.nn.AttentionMixer(window=6),
        ),
    )
    return mc.nn.LanguageModel(mc.nn.LanguageModelConfig(**config | changes), rngs=nnx.Rngs(0))


def stream(step, rows, cache, batch):
    """Outputs (b, LENGTH, ...) of ragged calls, each row at its own pace."""
    position = np.zeros(batch, int)
    outputs: list[list] = [[] for _ in range(batch)]
    while (position < LENGTH).any():
        lengths = np.minimum(np.array([1, 9, 6])[:batch], LENGTH - position)
        there = np.minimum(position[:, None] + np.arange(9)[None], LENGTH - 1)
        picked = jnp.stack([rows[b, there[b]] for b in range(batch)])
        y, cache = step(picked, cache, jnp.asarray(lengths))
        for b in range(batch):
            outputs[b].append(np.asarray(y[b, : lengths[b]]))
        position += lengths
    return np.stack([np.concatenate(row) for row in outputs]), cache
