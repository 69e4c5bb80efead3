"""Multi-head latent attention: one pass, streams of latent rows, meshes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import memcache_jax as mc
from memcache_jax.nn import attention
from memcache_jax.nn.layers import Linear
from tests.cases import assert_close
from tests.covers import first_kept

FEATURES, LENGTH = 8, 12
MIXER = mc.nn.LatentAttentionMixer(
    2, key_dim=3, shared_dim=2, value_dim=7, rank=5, query_rank=4, use_bias=True
)


def build(**changes):
    mixer = dataclasses.replace(MIXER, **changes)
    layer = mixer.build(FEATURES, rngs=nnx.Rngs(0))
    for _, param in nnx.to_flat_state(nnx.state(layer, nnx.Param)):
        noise = jax.random.normal(jax.random.key(1), param.shape)
        param.set_value(param[...] + 0.3 * noise)
    return layer, jax.random.normal(jax.random.key(2), (2, LENGTH, FEATURES))


@nnx.jit
def whole(layer, x, document_ids=None):
    return layer(x, document_ids)


@nnx.jit
def by_hand(layer, x):
    """The equations, for each head and token."""
    mixer, length = layer.mixer, x.shape[1]
    query = layer.query(layer.query_norm(layer.query_down(x)) if mixer.query_rank else x)
    query = query.reshape(*x.shape[:2], mixer.num_heads, -1)
    latent, shared = layer.down(x)[..., : mixer.rank], layer.down(x)[..., mixer.rank :]
    made = layer.up(layer.norm(latent)).reshape(*x.shape[:2], mixer.num_heads, -1)
    out = []
    for head in range(mixer.num_heads):
        key = jnp.concatenate([made[:, :, head, : mixer.key_dim], shared], axis=-1)
        scores = jnp.einsum("btk,bsk->bts", query[:, :, head], key) / np.sqrt(key.shape[-1])
        weights = jnp.exp(jnp.where(np.tri(length, dtype=bool), scores, -jnp.inf))
        weights /= weights.sum(axis=-1, keepdims=True)
        out.append(jnp.einsum("bts,bsv->btv", weights, made[:, :, head, mixer.key_dim :]))
    return layer.out(jnp.concatenate(out, axis=-1))


@pytest.mark.parametrize(
    "changes", [{}, dict(value_dim=3, query_rank=None, use_bias=False)], ids=["wide", "narrow"]
)
def test_the_equations_and_a_stream_that_keeps_latent_rows(changes):
    layer, x = build(**changes)
    expected = whole(layer, x)
    assert_close(expected, by_hand(layer, x), 1e-5)
    cache, extend = layer.init_cache(2, LENGTH), jax.jit(type(layer).extend)
    kept = MIXER.rank + MIXER.shared_dim
    assert (cache.key.shape, cache.value) == ((2, 1, LENGTH, kept), None)
    first, cache = extend(layer, x[:, :5], cache, jnp.array([5, 2]))
    assert_close(first[0], expected[0, :5], 1e-5)
    second, cache = extend(layer, jnp.stack([x[0, 5:8], x[1, 2:5]]), cache, None)
    assert_close(second, jnp.stack([expected[0, 5:8], expected[1, 2:5]]), 1e-5)
    cache = cache.take(jnp.array([1])).reset(jnp.array([False]))
    last, _ = extend(layer, x[1:, 5:], cache, None)
    assert_close(last[0], expected[1, 5:], 1e-5)


@pytest.mark.slow
def test_no_document_sees_another():
    layer, x = build()
    documents = jnp.where(jnp.arange(LENGTH) < 5, 3, 4)[None].repeat(2, axis=0)
    y = whole(layer, x, documents)
    assert_close(y[:, :5], whole(layer, x)[:, :5], 1e-5)
    later = jnp.roll(x, -5, axis=1)
    assert_close(y[:, 5:], whole(layer, later)[:, : LENGTH - 5], 1e-5)


@pytest.mark.parametrize("kind", first_kept(1, [AxisType.Explicit, AxisType.Auto]))
def test_on_a_mesh(kind):
    layer, x = build()
    expected, extend = whole(layer, x), jax.jit(type(layer).extend)
    call = jax.jit(lambda layer, x: layer(x))
    mesh = jax.make_mesh((2, 2, 2), ("rows", "part", "model"), axis_types=(kind,) * 3)
    with jax.set_mesh(mesh):
        for spec in (P("rows"), P("rows", "part")):
            laid = jax.device_put(x, NamedSharding(mesh, spec))
            assert_close(jax.device_get(call(layer, laid)), expected, 1e-5)
        cache = layer.init_cache(2, LENGTH, sharding=P("rows"))
        y, _ = extend(layer, jax.device_put(x, NamedSharding(mesh, P("rows"))), cache)
    assert_close(jax.device_get(y), expected, 1e-5)


@pytest.mark.slow
def test_a_stream_divides_the_heads_of_its_queries(monkeypatch):
    layer, x = build()
    expected, inner = whole(layer, x), attention.attend_stream
    shapes = []

    def attend(cache, query, *args, **options):
        shapes.append((query.shape, cache.key.shape))
        return inner(cache, query, *args, **options)

    monkeypatch.setattr(attention, "attend_stream", attend)
    with jax.set_mesh(mc.sharding.make_mesh(dict(data=2, tensor=2), devices=jax.devices()[:4])):
        cache = layer.init_cache(2, LENGTH, sharding=P("data"))
        y, cache = jax.jit(type(layer).extend)(layer, x, cache)
    assert_close(jax.device_get(y), expected, 1e-5)
    width = MIXER.rank + MIXER.shared_dim
    assert shapes == [((1, LENGTH, 1, width), (1, 1, LENGTH, width))]


class Adapted(Linear):
    """A projection that others have given an adapter of theirs."""

    lora_a: Any
    lora_b: Any
    calls = 0

    def __call__(self, inputs, out_sharding=None):
        del out_sharding
        Adapted.calls += 1
        return super().__call__(inputs) + inputs @ self.lora_a[...] @ self.lora_b[...]


@pytest.mark.slow
def test_a_stream_reads_once_through_adapters_of_others(monkeypatch):
    """Their dropout would draw another mask at each call."""
    layer, x = build()
    before = whole(layer, x)
    up: Any = layer.up
    up.lora_a = nnx.LoRAParam(jax.random.normal(jax.random.key(3), (MIXER.rank, 2)))
    up.lora_b = nnx.LoRAParam(jax.random.normal(jax.random.key(4), (2, 20)))
    up.__class__ = Adapted
    expected = whole(layer, x)
    assert np.abs(expected - before).max() > 0.1
    monkeypatch.setattr(Adapted, "calls", 0)
    y, _ = jax.jit(type(layer).extend)(layer, x, layer.init_cache(2, LENGTH))
    assert Adapted.calls == 1
    assert_close(y, expected, 1e-5)


def test_the_table_of_a_cache_counts_latent_rows():
    block = mc.nn.BlockConfig(MIXER)
    config = mc.nn.LanguageModelConfig(17, 2, FEATURES, 2, blocks=(block, block))
    model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
    table = mc.nn.cache_table(model, model.init_cache(1, 16), 16).splitlines()
    assert "896" in table[1]  # 2 layers, 16 tokens, 7 numbers of 4 bytes
    assert "896" in table[-1]


@pytest.mark.slow
def test_a_stream_reads_through_adapters_too():
    block = mc.nn.BlockConfig(MIXER)
    config = mc.nn.LanguageModelConfig(17, 1, FEATURES, 2, blocks=(block,))
    model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
    adapted = mc.nn.with_lora(model, rank=2, rngs=nnx.Rngs(1))
    for path, param in nnx.to_flat_state(nnx.state(adapted, nnx.PathContains("low_rank"))):
        param.set_value(jax.random.normal(jax.random.key(len(path)), param.shape))
    tokens = jnp.arange(10)[None]
    expected = whole(adapted, tokens)
    assert np.abs(expected - whole(model, tokens)).max() > 0.1
    hidden, _ = jax.jit(type(adapted).extend)(adapted, tokens, adapted.init_cache(1, 10))
    assert_close(adapted.logits(hidden), expected, 1e-5)
