"""Speculative decoding: the tokens of plain decoding, by fewer calls of the model."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from memcache_jax.generation.apart import apart
from memcache_jax.generation.prompts import check_stop
from memcache_jax.generation.sampling import Sampling
from memcache_jax.generation.speculate import accept, speculate
from tests.covers import exhaustive_unless
from tests.generation.models import VOCAB, language_model, prompts


@functools.cache
def smaller():
    config = mc.nn.LanguageModelConfig(VOCAB, num_layers=1, features=8, num_heads=2)
    return mc.nn.LanguageModel(config, rngs=nnx.Rngs(1))


def rounds(model, draft, tokens, new, sampling):
    """The new tokens, and the calls of the model after the prompt."""
    frame, state = apart(model)
    kind, arrays = draft.split()
    return speculate(
        *(tokens, jnp.full(len(tokens), tokens.shape[1]), state, arrays, jax.random.key(0)),
        *(sampling.numbers, check_stop(None, model), new),
        size=64,
        model=frame,
        cache=(),
        draft=kind,
        **sampling.static,
    )


@pytest.mark.parametrize(
    ("mixer", "draft"),
    [
        ("linear attention", mc.NGrams(tokens=7)),
        pytest.param("titans", mc.NGrams(tokens=9), marks=exhaustive_unless(False)),
        pytest.param("attention", "smaller", marks=pytest.mark.slow),
    ],
    ids=["linear", "titans", "attention"],
)
def test_greedy_tokens_are_those_of_plain_decoding(mixer, draft):
    """Rows of their own lengths, of which some stop, over ends of segments."""
    model, tokens = language_model(mixer), prompts(length=12)
    draft = mc.DraftModel(smaller(), 2) if draft == "smaller" else draft
    options: dict[str, Any] = dict(lengths=np.array([12, 3, 7]), temperature=0)
    wanted = np.asarray(mc.generate(model, tokens, 40, **options))
    np.testing.assert_array_equal(mc.generate(model, tokens, 40, **options, draft=draft), wanted)
    stop = int(wanted[0, 12 + 20])  # the first row ends here at the latest
    wanted = mc.generate(model, tokens, 40, **options, stop_token=stop)
    got = mc.generate(model, tokens, 40, **options, stop_token=stop, draft=draft)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.slow
@pytest.mark.parametrize(("mixer", "most"), [("linear attention", 4), ("titans", 6)])
def test_a_draft_that_is_right_saves_calls(mixer, most):
    """Calls of five tokens, after the first one; over Titans, 3 or 5 up to each chunk's end."""
    model, tokens = language_model(mixer), prompts()
    new, calls = rounds(model, mc.DraftModel(model, 4), tokens, 21, Sampling(0.0))
    wanted = mc.generate(model, tokens, 21, temperature=0)[:, 5:]
    np.testing.assert_array_equal(new[:, :21], wanted)
    assert calls == most


@pytest.mark.slow
def test_calls_of_sampled_tokens():
    model, tokens = language_model(), prompts()
    _, calls = rounds(model, mc.DraftModel(model, 4), tokens, 21, Sampling(0.7, top_p=0.9))
    assert calls <= 5  # what the model gives differs by rounding alone
    _, calls = rounds(model, mc.DraftModel(smaller(), 4), tokens, 21, Sampling(1.0))
    assert 4 < calls <= 20


@pytest.mark.slow
def test_bounded_memory():
    model, tokens = language_model(), prompts()
    options: dict[str, Any] = dict(temperature=0, cache=dict(max_segments=1, policy="drop_oldest"))
    wanted = mc.generate(model, tokens, 40, **options)
    got = mc.generate(model, tokens, 40, **options, draft=mc.NGrams(20))
    np.testing.assert_array_equal(got, wanted)
    # Room for as many tokens as plain decoding needs, and no more.
    options["cache"] = dict(max_segments=1)
    got = mc.generate(model, tokens, 28, **options, draft=mc.NGrams(20))
    np.testing.assert_array_equal(got, mc.generate(model, tokens, 28, **options))


@pytest.mark.slow
def test_sampled_tokens_have_the_models_distribution():
    rows, vocab = 40_000, 4
    wanted = np.array([[0.1, 0.4, 0.2, 0.3], [0.7, 0.0, 0.1, 0.2], [0.25, 0.25, 0.5, 0.0]])
    drawn_with = np.array([[0.4, 0.1, 0.2, 0.3], [0.2, 0.3, 0.5, 0.0]])

    @jax.jit
    def draw(key, chances):
        of_draft, of_model = jax.random.split(key)
        chances = jnp.broadcast_to(chances, (rows, 2, vocab))
        tokens = jax.random.categorical(of_draft, jnp.log(chances)).astype(jnp.int32)
        target = jnp.broadcast_to(jnp.asarray(wanted, jnp.float32), (rows, 3, vocab))
        most = jnp.where(jnp.arange(rows) % 2 == 0, 2, 1)
        kept, last = accept(of_model, tokens, chances, target, most)
        return jnp.pad(tokens, ((0, 0), (0, 1))).at[jnp.arange(rows), kept].set(last), kept

    certain = np.array([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])  # as of n-grams
    for seed, chances in enumerate((drawn_with, certain, wanted[:2])):
        tokens, kept = draw(jax.random.key(seed), jnp.asarray(chances, jnp.float32))
        tokens, kept = np.asarray(tokens), np.asarray(kept)
        assert kept[1::2].max() == 1
        assert abs((kept > 0).mean() - np.minimum(wanted[0], chances[0]).sum()) < 0.02
        for place in range(3):
            there = tokens[kept >= place, place]
            assert len(there) > 1000
            deviation = np.sqrt(wanted[place] * (1 - wanted[place]) / len(there))
            frequency = np.bincount(there, minlength=vocab) / len(there)
            assert (np.abs(frequency - wanted[place]) <= 5 * deviation).all(), (seed, place)
