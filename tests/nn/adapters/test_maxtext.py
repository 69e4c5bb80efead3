"""MaxText's ``self_attention``, in a decoder layer written as its layers are."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from tests.nn.adapters.hosts import MIXERS

CONFIG = types.SimpleNamespace(emb_dim=16, dropout_rate=0.0)
Attention = functools.partial(mc.nn.adapters.MaxTextAttention, mixer=MIXERS["memory"])


def attention(rngs, model_mode="train"):
    return Attention(
        config=CONFIG,
        num_query_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_target_length=32,
        attention_kernel="dot_product",
        inputs_q_shape=(2, 18, 16),
        inputs_kv_shape=(2, 18, 16),
        mesh=None,
        dtype=jnp.bfloat16,
        weight_dtype=jnp.float32,
        dropout_rate=0.0,
        quant=None,
        model_mode=model_mode,
        rngs=rngs,
    )


class DecoderLayer(nnx.Module):
    def __init__(self, rngs):
        self.pre_self_attention_layer_norm = nnx.RMSNorm(16, dtype=jnp.bfloat16, rngs=rngs)
        self.self_attention = attention(rngs)

    def __call__(self, inputs, decoder_segment_ids, decoder_positions, kv_cache=None):
        lnx = self.pre_self_attention_layer_norm(inputs)
        attention_lnx, kv_cache = self.self_attention(
            lnx,
            lnx,
            decoder_positions,
            decoder_segment_ids=decoder_segment_ids,
            deterministic=True,
            model_mode="train",
            slot=None,
            previous_chunk=None,
            out_sharding=None,
            kv_cache=kv_cache,
            attention_metadata=None,
        )
        return inputs + attention_lnx, kv_cache


def inputs():
    segments = jnp.asarray([[1] * 7 + [2] * 11, [1] * 15 + [0] * 3])
    return jax.random.normal(jax.random.key(1), (2, 18, 16), jnp.bfloat16), segments


@pytest.mark.slow
def test_segments_are_documents():
    layer = DecoderLayer(nnx.Rngs(0))
    x, segments = inputs()
    y, kv_cache = jax.jit(lambda layer, *args: layer(*args))(layer, x, segments, None)
    assert (y.dtype, kv_cache) == (jnp.bfloat16, None)

    @jax.jit
    def expected(layer, x, segments):
        return x + layer.self_attention.mixer(layer.pre_self_attention_layer_norm(x), segments)

    np.testing.assert_array_equal(y, expected(layer, x, segments))
    assert not np.array_equal(y[0, 7:], expected(layer, x, jnp.ones_like(segments))[0, 7:])


@pytest.mark.slow
def test_scanned_layers_have_gradients():
    """MaxText stacks its layers, and recomputes them in the backward pass."""

    @nnx.split_rngs(splits=2)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
        return DecoderLayer(rngs)

    graph, params = nnx.split(stack(nnx.Rngs(0)))
    x, segments = inputs()

    @jax.jit
    def gradients(params):
        @jax.checkpoint
        def run(x, layer):
            return nnx.merge(graph, layer)(x, segments, None)

        return jax.grad(lambda params: jax.lax.scan(run, x, params)[0].sum())(params)

    found = gradients(params)["self_attention"]["mixer"]["query"]["kernel"][...]
    assert found.dtype == jnp.float32
    assert jnp.isfinite(found).all()
    assert (jnp.abs(found).max(axis=(1, 2)) > 0).all()


def test_what_a_memory_cannot_do():
    with pytest.raises(ValueError, match="no keys to decode from: model_mode='prefill'"):
        attention(nnx.Rngs(0), model_mode="prefill")
    x, _ = inputs()
    for name in ("bidirectional_mask", "previous_chunk", "shared_key"):
        with pytest.raises(ValueError, match=f"has no {name}"):
            attention(nnx.Rngs(0))(x, x, **{name: x})
