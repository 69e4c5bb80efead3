"""Caches of layers: any split of a sequence gives the outputs of one pass."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import memcache_jax as mc
from tests.cases import assert_close
from tests.nn.caches import LAYERS, LENGTH, caching, inputs, stream


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    layer, x = LAYERS[name](nnx.Rngs(0)), inputs()
    graph, state = nnx.split(layer)
    step = jax.jit(
        lambda x, cache, lengths: nnx.merge(graph, state).extend(x, cache, lengths),
        donate_argnums=1,
    )
    y, _ = stream(step, x, layer.init_cache(3, LENGTH), 3)
    assert_close(y, nnx.jit(lambda layer, x: layer(x))(layer, x), 2e-5)


def test_call_with_a_cache():
    layer = caching(nnx.Rngs(0), mc.memories.LinearAttention(), mc.GRM())
    x, outputs = inputs(), []
    cache: Any = layer.init_cache(3, max_length=LENGTH)
    for begin, end in ((0, 30), (30, LENGTH)):
        y, cache = layer(x[:, begin:end], cache=cache)
        outputs.append(y)
    assert_close(jnp.concatenate(outputs, axis=1), layer(x), 2e-5)
    assert cache.nbytes == sum(a.nbytes for a in jax.tree.leaves(cache))
    with pytest.raises(ValueError, match="give no document_ids"):
        layer(x, jnp.zeros(x.shape[:2], int), cache=cache)


def test_initial_weights_are_trained_where_the_cache_is_a_constant():
    layer = caching(nnx.Rngs(0), mc.memories.Titans(chunk_size=2, depth=1), mc.Residual())

    @nnx.jit
    def gradients(layer, x, cache):
        def loss(layer):
            y, after = layer.extend(x, cache)
            return (y**2).sum(), after

        return nnx.grad(loss, has_aux=True)(layer)

    # Segments have 8 tokens: the first piece begins one and the third one does, not the second.
    cache, seen = layer.init_cache(1, 9), []
    for begin in (0, 3, 6):
        slopes, cache = gradients(layer, inputs(1)[:, begin : begin + 3], cache)
        seen.append(bool(jnp.any(slopes.weights.W[...])))
    assert seen == [True, False, True]
