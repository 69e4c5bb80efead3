"""Layers of papers against the equations of the papers, as plain loops."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from memcache_jax.nn import recurrent
from tests.cases import assert_close, with_slow
from tests.covers import kept_of

D, T = 6, 11
CACHES = dict(segmentation=mc.Constant(3), aggregation=mc.SSC(top_k=1))
LAYERS = {
    "lightning": lambda **caches: recurrent.lightning_attention(2, 4, decay_scale=0.7, **caches),
    "hgrn2": lambda **caches: recurrent.hgrn2(2, 4, least=0.2, **caches),
    "mamba3": lambda **caches: recurrent.mamba3(2, 3, state_dim=4, **caches),
    "positions": lambda **caches: recurrent.mamba3(2, 3, state_dim=4, rope_base=50.0, **caches),
    "titans": lambda **caches: recurrent.titans_block(
        mc.memories.GatedDeltaNet(), 2, 3, conv_width=2, **caches
    ),
}


def stirred(layer):
    """The layer with every parameter away from its first value."""
    rng = np.random.default_rng(1)

    def stir(param):
        return param + jnp.asarray(0.3 * rng.standard_normal(param.shape), param.dtype)

    nnx.update(layer, jax.tree.map(stir, nnx.state(layer, nnx.Param)))
    return layer


def made(name, **caches):
    return stirred(LAYERS[name](**caches).build(D, rngs=nnx.Rngs(0)))


def inputs():
    return np.random.default_rng(0).standard_normal((1, T, D))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def kernel(linear):
    return np.asarray(linear.kernel[...], np.float64)


def by_head(x, heads):
    return x.reshape(T, heads, -1)


def normed(y, scale, epsilon=1e-6):
    """An RMSNorm over all heads together."""
    y = y.reshape(T, -1)
    root = np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + epsilon)
    return y / root * np.asarray(scale[...], np.float64)


def read(memory, query):
    return np.einsum("hvk,hk->hv", memory, query)


def lightning(layer, x):
    query, key, value = (by_head(silu(x @ kernel(part.linear)), 2) for part in layer._paths)
    gamma = np.exp([-0.7 * 2**-4.0, -0.7 * 2**-8.0])[:, None, None]
    memory, reads = np.zeros((2, 4, 4)), []
    for t in range(T):
        memory = gamma * memory + value[t][:, :, None] * key[t][:, None]
        reads.append(read(memory, query[t]))
    gate = sigmoid(x @ kernel(layer.output.gate))
    return normed(np.stack(reads), layer.output.scale) * gate @ kernel(layer.output.out)


def hgrn2(layer, x):
    query = by_head(silu(x @ kernel(layer.query.linear)), 2)
    forget = by_head(0.2 + 0.8 * sigmoid(x @ kernel(layer.key.linear)), 2)
    value = by_head(x @ kernel(layer.value.linear), 2)
    memory, reads = np.zeros((2, 4, 4)), []
    for t in range(T):
        memory = memory * forget[t][:, None] + value[t][:, :, None] * (1 - forget[t])[:, None]
        reads.append(read(memory, query[t]))
    return normed(np.stack(reads), layer.output.scale) @ kernel(layer.output.out)


def mamba3(layer, x):
    part = layer.coefficients[0]
    step = np.log1p(np.exp(x @ kernel(part.step) + np.asarray(part.dt_bias[...], np.float64)))
    if hasattr(part, "angle"):
        turned = np.pi * np.tanh(x @ kernel(part.angle))
        angle = np.cumsum(step[:, :, None] * turned[:, None], axis=0)
    else:
        angle = np.arange(T)[:, None, None] * 50.0 ** (-np.arange(2) / 2)

    def rows(path, bias):
        row = normed(x @ kernel(path.linear), path.norm.scale, 1e-5)[:, None]
        row = row + np.asarray(bias[...], np.float64) if bias is not None else row
        first, second = np.split(row, 2, axis=-1)
        turned = [first * np.cos(angle) - second * np.sin(angle)]
        turned += [second * np.cos(angle) + first * np.sin(angle)]
        return np.broadcast_to(np.concatenate(turned, axis=-1), (T, 2, 4))

    query = rows(layer.query, getattr(layer, "query_bias", None))
    key = rows(layer.key, getattr(layer, "key_bias", None))
    value = by_head(x @ kernel(layer.value.linear), 2)
    share = sigmoid(x @ kernel(part.share))
    rate = np.maximum(np.log1p(np.exp(x @ kernel(part.rate))), 1e-4)
    alpha = np.exp(-rate * step)
    memory, written, reads = np.zeros((2, 3, 4)), np.zeros((2, 3, 4)), []
    skip = np.asarray(layer.skip[...], np.float64)[:, None]
    for t in range(T):
        before, written = written, value[t][:, :, None] * key[t][:, None]
        a, dt, s = (c[t][:, None, None] for c in (alpha, step, share))
        memory = a * memory + (1 - s) * dt * a * before + s * dt * written
        reads.append(read(memory, query[t]) + skip * value[t])
    gate = silu(x @ kernel(layer.output.gate))
    return np.stack(reads).reshape(T, -1) * gate @ kernel(layer.output.out)


def block(caches):
    """The library's own block, and the composed layer with its parameters."""
    own = stirred(
        mc.nn.MemoryCaching(
            D,
            2,
            head_dim=3,
            conv_width=2,
            memory=mc.memories.GatedDeltaNet(),
            **caches,
            rngs=nnx.Rngs(0),
        )
    )
    composed = made("titans", **caches)
    pairs = [(own.norm.scale, composed.output.scale), (own.temperature, composed.temperature)]
    for name in ("query", "key", "value"):
        rows = getattr(composed, name)
        pairs.append((getattr(own, name).kernel, rows.linear.kernel))
        pairs.append((getattr(own, f"{name}_conv").kernel, rows.conv.kernel))
    part: Any = composed.coefficients[0]
    for name, linear in part.controls.items():
        pairs += [
            (own.controls[name].kernel, linear.kernel),
            (own.controls[name].bias, linear.bias),
        ]
    pairs.append((own.connector.kernel, composed.connector.kernel))
    gate: Any = composed.output.gate
    pairs.append((own.output_gate.kernel, gate.kernel))
    pairs.append((own.out.kernel, composed.output.out.kernel))
    assert len(pairs) == len(jax.tree.leaves(nnx.state(composed, nnx.Param)))
    for source, target in pairs:
        target[...] = source[...]
    return own, composed


EQUATIONS = dict(lightning=lightning, hgrn2=hgrn2, mamba3=mamba3, positions=mamba3)


@pytest.mark.parametrize("name", with_slow([*EQUATIONS], "lightning"))
def test_the_equation(name):
    layer, x, equation = made(name), inputs(), EQUATIONS[name]
    y = jax.jit(lambda layer, x: layer(x))(layer, jnp.asarray(x, jnp.float32))
    assert_close(y[0], equation(layer, x[0]), 1e-5)


@pytest.mark.slow
def test_the_block_is_that_of_memory_caching():
    own, composed = block(CACHES)
    x = jnp.asarray(inputs(), jnp.float32)
    expected, y = jax.jit(lambda own, composed, x: (own(x), composed(x)))(own, composed, x)
    assert_close(y, expected, 1e-6)


def test_the_block_starts_as_memory_caching_does():
    layer = LAYERS["titans"](**CACHES).build(D, rngs=nnx.Rngs(0))
    query = layer.query.linear.kernel[...]
    for other in (layer.key.linear, layer.connector):
        np.testing.assert_array_equal(other.kernel[...], query)
    np.testing.assert_array_equal(layer.key.conv.kernel[...], layer.query.conv.kernel[...])
    np.testing.assert_array_equal(layer.temperature[...], 10.0)
    assert np.any(layer.value.linear.kernel[...] != query)


@pytest.mark.parametrize("name", kept_of([*LAYERS], "mamba3", "titans"))
def test_caches_and_streams(name):
    """One pass is the reference, and a stream is one pass."""
    layer = made(name, **CACHES)
    plain = LAYERS[name](**CACHES, implementation="reference").build(D, rngs=nnx.Rngs(0))
    nnx.update(plain, nnx.state(layer, nnx.Param))

    @jax.jit
    def run(layer, plain, x):
        cache, pieces = layer.init_cache(1, T), []
        for piece in (x[:, :4], x[:, 4:]):
            y, cache = layer.extend(piece, cache)
            pieces.append(y)
        return layer(x), plain(x), jnp.concatenate(pieces, axis=1)

    y, expected, stream = run(layer, plain, jnp.asarray(inputs(), jnp.float32))
    assert_close(y, expected, 1e-5)
    assert_close(stream, y, 1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: recurrent.lightning_attention(0, 4), "heads must be at least 1"),
        (lambda: recurrent.hgrn2(2, 4, least=1.0), r"least must be in \[0, 1\)"),
        (lambda: recurrent.mamba3(2, 4, state_dim=5, rope_base=9.0), "even dim"),
        (lambda: replace(recurrent.mamba3(2, 4, rope_base=9.0), biases=True), "biases are added"),
        (lambda: recurrent.titans_block(mc.memories.Titans(), 2, 4), "initial weights"),
    ],
    ids=["heads", "least", "odd", "biases", "weights"],
)
def test_sizes_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()
