"""Drafts: what is proposed, and what is refused."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from tests.generation.models import count_up, language_model, prompts


def test_what_followed_the_last_tokens():
    @functools.partial(jax.jit, static_argnums=0)
    def propose(draft, known, count):
        args = jnp.full(1, 9), jax.random.key(0), (0.0, 1.0), 128
        return draft.propose(None, known, count, *args)[:3]

    def following(text, tokens=4, longest=3):
        """What is proposed, and whether it is where all of ``longest`` tokens must be the same."""
        known = np.pad([ord(letter) for letter in text], (0, 20 - len(text)))
        draft = mc.NGrams(tokens, longest, shortest=longest)
        drawn, chances, proposed = propose(draft, known[None], np.array([len(text)]))
        np.testing.assert_array_equal(jnp.argmax(chances, axis=-1), drawn)
        assert chances.sum() == tokens
        assert proposed in (0, tokens)
        return "".join(map(chr, drawn[0].tolist())), bool(proposed)

    assert following("the cat, the c") == ("at, ", True)
    assert following("xab1 yab2 ab") == ("2 ab", False)  # the last of equal places
    assert following("xab1 yab2 xab") == ("1 ya", True)  # the longest of all
    assert following("xab1 yab2 xab", longest=2) == ("2 xa", True)
    assert following("abcabc", tokens=7) == ("abcabca", True)  # round and round
    assert following("ab") == ("bbbb", False)
    assert following("a", tokens=1) == ("a", False)

    def proposed(text):
        """How many tokens are proposed, of up to 6 where up to 5 are compared."""
        known = np.pad([ord(letter) for letter in text], (0, 20 - len(text)))
        return int(propose(mc.NGrams(6, 5), known[None], np.array([len(text)]))[2][0])

    texts = "abcde xcd", "abcde xbcd", "abcde abcd", "abcde1 abcde"
    assert [proposed(text) for text in texts] == [0, 3, 4, 6]


@pytest.mark.usefixtures("unchecked")
def test_what_is_refused():
    model, tokens = language_model(), prompts()
    function: Any = count_up
    other = mc.nn.LanguageModel(
        mc.nn.LanguageModelConfig(22, num_layers=1, features=8, num_heads=2), rngs=nnx.Rngs(0)
    )
    for call, message in {
        lambda: mc.NGrams(0): "tokens must be at least 1, got 0",
        lambda: mc.NGrams(longest=0): "longest must be at least 1, got 0",
        lambda: mc.NGrams(longest=2, shortest=3): "shortest must be at most longest=2, got 3",
        lambda: mc.DraftModel(function): r"model must be an mc\.nn\.LanguageModel",
        lambda: mc.DraftModel(model, tokens=0): "tokens must be at least 1, got 0",
        lambda: greedy(model, tokens, "ngrams"): r"draft must be mc\.NGrams\(\) or mc\.Draft",
        lambda: greedy(count_up, tokens, mc.NGrams()): r"is for an nn\.LanguageModel",
        lambda: greedy(model, tokens, mc.DraftModel(other)): "model's vocabulary, 23, got 22",
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def greedy(model, tokens, draft):
    return mc.generate(model, tokens, 2, temperature=0, draft=draft)
