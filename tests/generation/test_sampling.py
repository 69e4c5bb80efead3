"""Sampling: frequencies under temperature, top-k and top-p."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from tests.generation.models import always


def test_equal_rows_are_sampled_apart():
    rows = mc.generate(
        always(0.25, 0.25, 0.25, 0.25), jnp.zeros((2, 1), int), 30, key=jax.random.key(0)
    )
    assert (rows[0] != rows[1]).any()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "expected"),
    [
        (1.0, None, 1.0, [0.1, 0.4, 0.2, 0.3]),
        (0.5, None, 1.0, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),  # squares of the probabilities
        (1.0, None, 0.65, [0, 4 / 7, 0, 3 / 7]),
        (1.0, None, 0.75, [0, 4 / 9, 2 / 9, 3 / 9]),
        (1.0, None, 0.3, [0, 1, 0, 0]),  # the first token alone is more than that
        (1.0, None, 1e-9, [0, 1, 0, 0]),
        (1e-30, None, 1.0, [0, 1, 0, 0]),
        (1e-45, None, 0.5, [0, 1, 0, 0]),  # below the smallest normal float32
        (1.0, 9, 1.0, [0.1, 0.4, 0.2, 0.3]),
        (1.0, 3, 1.0, [0, 4 / 9, 2 / 9, 3 / 9]),
        (1.0, 3, 0.7, [0, 4 / 7, 0, 3 / 7]),  # 7/9 of what the three have
        (1.0, 1, 1.0, [0, 1, 0, 0]),
    ],
)
def test_sampled_frequencies(temperature, top_k, top_p, expected):
    model = always(0.1, 0.4, 0.2, 0.3)
    prompt = jnp.zeros((200, 1), jnp.int32)
    tokens = mc.generate(
        model,
        prompt,
        60,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        key=jax.random.key(0),
    )
    frequencies = np.bincount(np.asarray(tokens[:, 1:]).ravel(), minlength=4) / (200 * 60)
    # Five standard deviations of 12,000 draws; a probability of 0 or 1 leaves none.
    deviation = np.sqrt(np.multiply(expected, np.subtract(1, expected)) / (200 * 60))
    assert (np.abs(frequencies - expected) <= 5 * deviation).all(), frequencies


def test_top_p_keeps_the_same_number_of_equal_tokens():
    tokens = mc.generate(
        always(0.25, 0.25, 0.25, 0.25),
        jnp.zeros((50, 1), int),
        20,
        top_p=0.5,
        key=jax.random.key(0),
    )
    assert set(np.unique(tokens[:, 1:])) == {0, 1}


def test_minus_infinity_is_never_sampled():
    model = always(0.0, 0.5, 0.5)
    for top_p in (0.999, 1.0):
        tokens = mc.generate(model, jnp.ones((50, 1), int), 20, top_p=top_p, key=jax.random.key(0))
        assert tokens.min() == 1
