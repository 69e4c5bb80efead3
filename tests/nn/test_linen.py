"""The layer's Linen form: in a training loop of Linen's, and against the NNX form."""

import flax.linen
import jax
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util

import memcache_jax as mc
from tests.nn.loops import FEATURES, HEADS, OPTIONS, VOCAB, cross_entropy, repeating_tokens


class LinenModel(flax.linen.Module):
    """A Linen model with the layer inside."""

    name_of_options: str

    @flax.linen.compact
    def __call__(self, tokens):
        x = flax.linen.Embed(VOCAB, FEATURES)(tokens)
        mixer = mc.nn.linen.MemoryCaching(FEATURES, HEADS, **OPTIONS[self.name_of_options])
        x = x + mixer(flax.linen.RMSNorm()(x))
        return flax.linen.Dense(VOCAB)(x)


@pytest.mark.parametrize("name", OPTIONS)
def test_linen_loop(name):
    model, tokens = LinenModel(name), repeating_tokens()
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    optimizer = optax.adam(1e-2)
    state = optimizer.init(params)

    def loss_fn(params, tokens):
        return cross_entropy(model.apply({"params": params}, tokens), tokens)

    @jax.jit
    def train_step(params, state, tokens):
        loss, gradients = jax.value_and_grad(loss_fn)(params, tokens)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(30):
        params, state, loss = train_step(params, state, tokens)
        losses.append(float(loss))
    assert losses[0] > 0.8 * np.log(VOCAB)
    assert losses[-1] < losses[0] / 3


@pytest.mark.parametrize("name", OPTIONS)
def test_linen_and_nnx_forms_are_equal_for_equal_parameters(name):
    x = jax.random.normal(jax.random.key(1), (2, 21, FEATURES))
    bridged = mc.nn.linen.MemoryCaching(FEATURES, HEADS, **OPTIONS[name])
    variables = jax.jit(bridged.init)(jax.random.key(0), x)
    expected = jax.jit(bridged.apply)(variables, x)

    layer = mc.nn.MemoryCaching(FEATURES, HEADS, **OPTIONS[name], rngs=nnx.Rngs(7))
    graph, state = nnx.split(layer, nnx.Param)
    apply = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    assert not np.allclose(apply(state, x), expected, atol=1e-3)
    flat = dict(nnx.to_flat_state(state))
    params = traverse_util.flatten_dict(variables["params"])
    assert {tuple(map(str, path)) for path in flat} == {tuple(map(str, path)) for path in params}
    for path, value in params.items():
        flat[path] = flat[path].replace(value)
    np.testing.assert_allclose(apply(nnx.from_flat_state(flat), x), expected, atol=1e-6)
