"""The attention of Flax's Gemma example, in a model written as that example is."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import memcache_jax as mc
from tests.covers import first_kept
from tests.nn.adapters.hosts import (
    MIXERS,
    PAD,
    VOCAB,
    causal_mask,
    positions,
    random_tokens,
    step_mask,
)


class Block(nnx.Module):
    def __init__(self, mixer, rngs):
        self.pre_attention_norm = nnx.RMSNorm(16, rngs=rngs)
        self.attn = mc.nn.adapters.GemmaAttention(
            num_heads=2,
            num_kv_heads=1,
            features=16,
            head_dim=8,
            query_pre_attn_scalar=1.0,
            attn_type="global",
            rope_base_frequency=10_000,
            sliding_window_size=None,
            rngs=rngs,
            dropout_rate=0.0,
            mixer=mixer,
        )

    def __call__(self, x, segment_pos, cache, attn_mask, rngs=None):
        inputs = self.pre_attention_norm(x)
        cache, y = self.attn(inputs, segment_pos, cache, attn_mask, rngs=rngs)
        return cache, x + y


class Transformer(nnx.Module):
    def __init__(self, mixer, rngs):
        self.embedder = nnx.Embed(VOCAB, 16, rngs=rngs)
        self.layers = nnx.List([Block(mixer, rngs) for _ in range(2)])

    def init_cache(self, cache_size, batch_size, dtype=jnp.float32):
        options = dict(cache_size=cache_size, batch_size=batch_size, dtype=dtype)
        return {f"layer_{i}": x.attn.init_cache(**options) for i, x in enumerate(self.layers)}

    def __call__(self, last_tokens, positions, cache, attention_mask, rngs=None):
        new_cache: Any = None if cache is None else {}
        x = self.embedder(last_tokens)
        for i, layer in enumerate(self.layers):
            layer_cache = cache[f"layer_{i}"] if cache else None
            layer_cache, x = layer(x, positions, layer_cache, attention_mask, rngs=rngs)
            if cache is not None:
                new_cache[f"layer_{i}"] = layer_cache
        return self.embedder.attend(x), new_cache


@pytest.fixture(params=first_kept(1, [*MIXERS]))
def model(request):
    return Transformer(MIXERS[request.param], nnx.Rngs(0))


@nnx.jit
def whole(model, tokens, mask):
    return model(tokens, positions(tokens != PAD), None, mask)[0]


@pytest.mark.slow
def test_packed_documents(model):
    segments = jnp.asarray([[1] * 6 + [2] * 9 + [0] * 3])
    tokens = jnp.where(segments > 0, random_tokens(1, 18), PAD)
    mask = causal_mask(tokens != PAD) & (segments[:, None] == segments[..., None])
    got = whole(model, tokens, mask)
    alone = tokens[:, :6]
    expected = whole(model, alone, causal_mask(alone != PAD))
    np.testing.assert_allclose(got[:, :6], expected, atol=2e-5)
    other = tokens.at[:, :6].set(random_tokens(1, 6, seed=1))
    np.testing.assert_allclose(whole(model, other, mask)[:, 6:15], got[:, 6:15], atol=2e-5)
    whole_row = whole(model, tokens, causal_mask(tokens != PAD))
    assert abs(whole_row[:, 6:15] - got[:, 6:15]).max() > 1e-2


@pytest.mark.slow
def test_the_samplers_loop(model):
    """Row by row of different prompts, token by token."""
    tokens, size = random_tokens(2, 11), 16

    @nnx.jit
    def sample(model, tokens):
        def step(cache, i):
            last = jax.lax.dynamic_slice_in_dim(tokens, i, 1, axis=1)
            place = jnp.full((2, 1), i)
            logits, cache = model(last, place, cache, step_mask(i, tokens, size))
            return cache, logits[:, 0]

        cache = model.init_cache(cache_size=size, batch_size=2)
        return jax.lax.scan(step, cache, jnp.arange(tokens.shape[1]))[1]

    expected = whole(model, tokens, causal_mask(tokens != PAD))
    np.testing.assert_allclose(sample(model, tokens).swapaxes(0, 1), expected, atol=2e-5)

    # A drawn token may be the padding's: later tokens do not see it.
    padded = jnp.concatenate([tokens[:, :5], jnp.full((2, 1), PAD), tokens[:, 5:]], axis=1)
    got = sample(model, padded).swapaxes(0, 1)
    np.testing.assert_allclose(jnp.delete(got, 5, axis=1), expected, atol=2e-5)


@pytest.mark.slow
def test_a_prefill_with_padding_on_the_left(model):
    tokens, size = random_tokens(2, 12), 16
    tokens = tokens.at[1, :5].set(PAD)
    mask = causal_mask(tokens != PAD)
    wide = jnp.pad(mask, ((0, 0), (0, 0), (0, size - 12)))

    @nnx.jit
    def streamed(model, tokens, wide):
        cache, parts = model.init_cache(cache_size=size, batch_size=2), []
        for begin, end in ((0, 9), (9, 12)):
            part = tokens[:, begin:end]
            logits, cache = model(part, positions(part != PAD), cache, wide[:, begin:end])
            parts.append(logits)
        return jnp.concatenate(parts, axis=1)

    got = streamed(model, tokens, wide)
    for row, padding in ((0, 0), (1, 5)):
        alone = tokens[row : row + 1, padding:]
        expected = whole(model, alone, causal_mask(alone != PAD))
        np.testing.assert_allclose(got[row : row + 1, padding:], expected, atol=2e-5)


@pytest.mark.slow
def test_train_step():
    model = Transformer(MIXERS["memory"], nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(2e-2), wrt=nnx.Param)
    tokens = jnp.tile(random_tokens(2, 5), (1, 4))

    @nnx.jit
    def train_step(model, optimizer, tokens):
        def loss_fn(model):
            logits = whole(model, tokens[:, :-1], causal_mask(tokens[:, :-1] != PAD))
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        loss, gradients = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(train_step(model, optimizer, tokens)) for _ in range(20)]
    assert losses[-1] < losses[0] / 2


def test_a_cache_goes_on_by_a_mask():
    attention = Transformer(MIXERS["memory"], nnx.Rngs(0)).layers[0].attn
    cache = attention.init_cache(cache_size=8, batch_size=1)
    wrong: Any = ((None, "none"), (jnp.ones((1, 8), bool), r"shape \(1, 8\)"))
    for mask, got in wrong:
        with pytest.raises(ValueError, match=rf"the mask must be \(b, t, keys\), got {got}"):
            attention(jnp.ones((1, 1, 16)), None, cache, mask)


@pytest.mark.slow
def test_masks_that_are_not_honoured():
    model = Transformer(MIXERS["memory"], nnx.Rngs(0))
    x, mask = jnp.ones((1, 6, 16)), jnp.ones((1, 6, 6), bool)
    attention = model.layers[0].attn
    with pytest.raises(ValueError, match="the mask is bidirectional"):
        attention(x, None, None, mask)
    _, y = jax.jit(lambda mask: attention(x, None, None, mask))(mask)
    np.testing.assert_array_equal(np.isnan(y[0, :, 0]), [True] * 5 + [False])
