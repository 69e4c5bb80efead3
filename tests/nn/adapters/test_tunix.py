"""Tunix's model call: its trainer's step, its sampler's loop, and the layers as a list."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import memcache_jax as mc
from tests.nn.adapters.hosts import (
    MIXERS,
    PAD,
    VOCAB,
    causal_mask,
    positions,
    random_tokens,
    step_mask,
)


def language_model(*mixers, **options):
    mixers = tuple(MIXERS[mixer] for mixer in mixers)
    config = mc.nn.LanguageModelConfig(VOCAB, 2, 16, 2, mixers=mixers, **options)
    return mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module", params=[("memory",), ("memory", "attention")], ids="-".join)
def original(request):
    return language_model(*request.param)


@pytest.fixture
def model(original):
    return mc.nn.adapters.TunixModel(original)


@nnx.jit
def call(model, tokens):
    """The call of a trainer, on rows with padding."""
    real = tokens != PAD
    return model(tokens, positions(real), None, causal_mask(real))[0]


@nnx.jit
def plain(model, tokens):
    return model(tokens)


def padded(tokens, padding):
    """Rows moved to the right, by as many tokens of padding."""
    length = tokens.shape[1]
    rows = [[PAD] * n + row[: length - n].tolist() for row, n in zip(tokens, padding, strict=True)]
    return jnp.asarray(rows)


@pytest.mark.slow
def test_padding_does_not_change_the_logits(original, model):
    tokens = random_tokens(3, 14)
    rows = padded(tokens, (0, 3, 6)).at[0, 10:].set(PAD)
    got, expected = call(model, rows), plain(original, tokens)
    np.testing.assert_allclose(got[0, :10], expected[0, :10], atol=2e-5)
    for row, n in ((1, 3), (2, 6)):
        np.testing.assert_allclose(got[row, n:], expected[row, : 14 - n], atol=2e-5)


@pytest.mark.slow
def test_the_samplers_loop(original, model):
    """A prefill of prompts that end together, then one token at a time."""
    tokens, prompt, steps, size = random_tokens(2, 9), 9, 5, 16
    tokens = padded(tokens, (0, 4))

    @nnx.jit
    def sample(model, tokens):
        buffer = jnp.pad(tokens, ((0, 0), (0, steps)))
        cache = model.init_cache(2, size, jnp.float32)
        mask = jnp.pad(causal_mask(tokens != PAD), ((0, 0), (0, 0), (0, size - prompt)))
        place = positions(tokens != PAD)
        logits, cache = model(tokens, place, cache, mask, decode_only_last_token=True)
        assert logits.shape == (2, 1, VOCAB)
        buffer = buffer.at[:, prompt].set(jnp.argmax(logits[:, -1, 1:], axis=-1) + 1)

        def step(i, state):
            buffer, cache = state
            last = jax.lax.dynamic_slice_in_dim(buffer, i, 1, axis=1)
            mask = step_mask(i, buffer, size)
            logits, cache = model(
                last, positions=place[:, -1:] + i - 8, cache=cache, attention_mask=mask
            )
            new = jnp.argmax(logits[:, -1, 1:], axis=-1) + 1
            return buffer.at[:, i + 1].set(new), cache

        return jax.lax.fori_loop(prompt, prompt + steps - 1, step, (buffer, cache))[0]

    drawn = sample(model, tokens)
    for row, n in ((0, 0), (1, 4)):
        alone = drawn[row : row + 1, n:]
        best = jnp.argmax(plain(original, alone)[..., 1:], axis=-1) + 1
        np.testing.assert_array_equal(alone[0, prompt - n :], best[0, prompt - n - 1 : -1])


@pytest.mark.slow
def test_documents_without_a_mask(original, model):
    tokens = random_tokens(1, 14)
    documents = jnp.asarray([[1] * 6 + [2] * 8])
    expected = nnx.jit(lambda model: model(tokens, documents))(original)
    place = jnp.asarray([[*range(6), *range(8)]])
    for options in (dict(segment_ids=documents), dict(positions=place)):
        logits, cache = nnx.jit(lambda model, options: model(tokens, **options))(model, options)
        assert cache is None
        np.testing.assert_allclose(logits, expected, atol=2e-5)


@pytest.mark.slow
def test_train_step():
    """The loss of Tunix's trainer falls, and the trained model generates as ours."""
    model = mc.nn.adapters.TunixModel(language_model("memory"))
    optimizer = nnx.Optimizer(model, optax.adam(2e-2), wrt=nnx.Param)
    word = random_tokens(2, 5)
    rows = padded(jnp.tile(word, (1, 4)), (0, 3))

    @nnx.jit(donate_argnames=("model", "optimizer"))
    def train_step(model, optimizer, tokens):
        def loss_fn(model):
            logits, target = call(model, tokens)[:, :-1], tokens[:, 1:]
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, target)
            return (loss * (target != PAD)).sum() / (target != PAD).sum()

        loss, gradients = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(train_step(model, optimizer, rows)) for _ in range(30)]
    assert losses[-1] < losses[0] / 4
    drawn = mc.generate(
        model.language_model(), jnp.tile(word, (1, 2)), max_new_tokens=5, temperature=0
    )
    np.testing.assert_array_equal(drawn[:, 10:], word)


@pytest.mark.slow
def test_a_call_as_the_command_line_makes_it(model):
    logits, _ = model(**model.get_model_input())
    assert logits.shape == (2, 1, model.num_embed)


def test_a_mask_that_is_not_honoured(model):
    tokens = random_tokens(1, 6)
    with pytest.raises(ValueError, match="the mask is bidirectional"):
        model(tokens, None, None, jnp.ones((1, 6, 6), bool))
