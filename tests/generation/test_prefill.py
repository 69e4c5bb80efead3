"""Prompts in caches whose rows go back by tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memcache_jax.generation.prefill import prefill
from tests.generation.models import language_model, prompts


@pytest.mark.parametrize("mixer", ["linear attention", "titans"])
def test_rows_go_back_into_later_tokens_only(mixer):
    model, tokens = language_model(mixer), prompts(length=16)
    lengths, more = jnp.array([16, 3, 12]), prompts(length=4)
    hidden, cache = prefill(model, tokens, model.init_cache(3, 32, rewind=5), lengths)
    wanted, fixed = model.extend(tokens, model.init_cache(3, 32), lengths)
    np.testing.assert_allclose(hidden, wanted, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(cache.rewindable, 0)
    back, taken = jnp.array([4, 2, 1]), jnp.array([4, 3, 4])
    _, ahead = model.extend(more, cache, taken)
    np.testing.assert_array_equal(ahead.rewindable, taken)
    got, _ = model.extend(more, ahead.rewind(back))
    _, once = model.extend(more, fixed, taken - back)
    wanted, _ = model.extend(more, once)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)


def test_a_prompt_makes_no_history():
    """Nothing is kept of the states before each token, which going back needs."""
    model, tokens = language_model("titans"), prompts(length=16)
    cache, lengths = model.init_cache(3, 32, rewind=5), jnp.array([16, 3, 12])

    def kept(cache):
        past = cache.with_states(cache.layers)[0].memory.past
        return any(jnp.any(x != 0) for x in jax.tree.leaves(past))

    assert not kept(prefill(model, tokens, cache, lengths)[1])
    assert kept(model.extend(tokens, cache, lengths)[1])
