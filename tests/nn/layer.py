"""A small layer with memory caching, and inputs for it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import memcache_jax as mc
from tests.cases import AGGREGATIONS, MEMORIES


def make(memory="titans", aggregation="grm", **changes):
    options: Any = dict(segmentation=mc.Constant(8), rngs=nnx.Rngs(0)) | changes
    return mc.nn.MemoryCaching(
        16, 2, memory=MEMORIES[memory], aggregation=AGGREGATIONS[aggregation], **options
    )


def randomized(layer, seed=1):
    """The layer with other parameters than it starts with, so that no two are alike."""
    graph, params = nnx.split(layer)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


def tokens(length, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), (2, length, 16), dtype)


def call(layer, x):
    return jax.jit(lambda layer, x: layer(x))(layer, x)
