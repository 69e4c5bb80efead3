"""The decoder: conversations, and prompts shorter than a buffer."""

import jax
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from tests.generation.models import VOCAB, language_model, prompts


@pytest.mark.slow
def test_decoder():
    model, tokens = language_model(), prompts(length=9)
    wanted = np.asarray(mc.generate(model, tokens, 6, temperature=0))
    decoder = mc.Decoder(model, 3, max_length=40, temperature=0)
    with pytest.raises(ValueError, match="feed at least one token"):
        decoder.next()
    decoder.feed(tokens[:, :4])
    decoder.feed(tokens[:, 4:])
    np.testing.assert_array_equal(
        np.stack([decoder.next() for _ in range(6)], axis=1), wanted[:, 9:]
    )

    # The conversation goes on, rows at a place of their own.
    lengths = np.array([2, 9, 5])
    decoder.feed(tokens, lengths=lengths)
    after = np.stack([decoder.next() for _ in range(4)], axis=1)
    told, lengths = np.concatenate([wanted, tokens], axis=1), wanted.shape[1] + lengths
    again = np.asarray(mc.generate(model, told, 4, lengths=lengths, temperature=0))
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(again[row, length : length + 4], after[row])
    kept = decoder.cache.take(np.arange(3))
    decoder.feed(tokens[:, :1], lengths=np.array([1, 0, 0]))
    decoder.cache = kept
    with pytest.raises(ValueError, match="feed at least one token"):
        decoder.next()
    decoder.feed(tokens[:, :1])
    with pytest.raises(ValueError, match="holds 40 tokens in a row and would have 4"):
        decoder.feed(np.ones((3, 20), int))
    decoder.next()


@pytest.mark.slow
def test_prompts_of_attention_alone_may_be_shorter_than_a_buffer():
    mixers = (mc.nn.AttentionMixer(), mc.nn.AttentionMixer(window=4))
    config = mc.nn.LanguageModelConfig(
        vocab_size=VOCAB, num_layers=2, features=16, num_heads=2, mixers=mixers
    )
    decoder = mc.Decoder(
        mc.nn.LanguageModel(config, rngs=nnx.Rngs(0)), 3, max_length=30, temperature=0
    )
    decoder.feed(prompts(length=9))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(decoder.cache.states))
