"""The layer in models and training loops that are not ours: Flax NNX and Linen."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util

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


class Attention(nnx.Module):
    """What a user has: causal attention by Flax."""

    def __init__(self, features, num_heads, *, rngs):
        self.attention = nnx.MultiHeadAttention(
            num_heads, features, decode=False, use_bias=False, rngs=rngs
        )

    def __call__(self, x):
        return self.attention(x, mask=nnx.make_causal_mask(x[..., 0]))


class Model(nnx.Module):
    def __init__(self, mixer, *, rngs):
        self.embed = nnx.Embed(VOCAB, FEATURES, rngs=rngs)
        self.norm = nnx.RMSNorm(FEATURES, rngs=rngs)
        self.mixer = mixer
        self.head = nnx.Linear(FEATURES, VOCAB, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        return self.head(x + self.mixer(self.norm(x)))


def repeating_tokens(length=25):
    """Rows that repeat a random word, so that a model without memory cannot tell what follows."""
    word = jax.random.randint(jax.random.key(0), (4, 10), 0, VOCAB)
    return jnp.tile(word, (1, -(-length // 10)))[:, :length]


def cross_entropy(logits, tokens):
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


@pytest.mark.parametrize("name", ["attention", *OPTIONS])
def test_nnx_loop(name):
    rngs = nnx.Rngs(0)
    if name == "attention":
        mixer = Attention(FEATURES, HEADS, rngs=rngs)
    else:
        mixer = mc.nn.MemoryCaching(FEATURES, HEADS, **OPTIONS[name], rngs=rngs)
    model = Model(mixer, rngs=rngs)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, tokens):
        loss, gradients = nnx.value_and_grad(lambda m: cross_entropy(m(tokens), tokens))(model)
        optimizer.update(model, gradients)
        return loss

    tokens = repeating_tokens()
    losses = [float(train_step(model, optimizer, tokens)) for _ in range(30)]
    assert losses[0] > 0.8 * np.log(VOCAB)
    assert losses[-1] < losses[0] / 3


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
