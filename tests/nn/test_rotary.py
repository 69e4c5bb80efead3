"""Rotary positions: against angles in float64, at any distance from the start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from memcache_jax.nn.rotary import rotate
from tests.cases import assert_close


@pytest.mark.parametrize("base", [0.5, 10_000.0, 500_000.0])
def test_rotations_are_those_of_exact_angles(base):
    place = np.array([0, 1, 999, 2**16, 2**20 + 3, 2**24 + 1, 2**31 - 1])
    x = jax.random.normal(jax.random.key(0), (1, len(place), 1, 8))
    first, second = np.asarray(x, np.float64)[0, :, 0, :4], np.asarray(x, np.float64)[0, :, 0, 4:]
    angle = place[:, None] * base ** (-np.arange(4) / 4)
    cos, sin = np.cos(angle), np.sin(angle)
    wanted = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    got = rotate(x, base, jnp.asarray(place, jnp.int32)[None])
    assert_close(got[0, :, 0], wanted.astype(np.float32), 2e-6)


def test_tables_are_the_same_rotations():
    x = jax.random.normal(jax.random.key(0), (1, 300, 1, 8))
    assert_close(rotate(x, 1e4), rotate(x, 1e4, jnp.arange(300)[None]), 2e-6)


def test_scores_depend_on_distance_alone():
    query, key = jax.random.normal(jax.random.key(0), (2, 8))
    here = lambda x: rotate(jnp.tile(x[None, None, None], (1, 30, 1, 1)), 100.0)[0, :, 0]  # noqa: E731
    scores = np.asarray(here(query) @ here(key).T)
    for distance in range(5):
        diagonal = np.diagonal(scores, -distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
    assert abs(scores[1, 0] - scores[2, 0]) > 1e-3


def test_bfloat16_keeps_precision_far_from_the_start():
    x = jnp.ones((1, 5000, 1, 4), jnp.bfloat16)
    y = rotate(x, 10_000.0)
    assert y.dtype == jnp.bfloat16
    assert_close(y.astype(jnp.float32), rotate(x.astype(jnp.float32), 10_000.0), 1e-2)


@pytest.mark.slow
def test_a_window_gives_far_from_the_start_what_it_gives_at_the_start():
    layer = mc.nn.Attention(16, 2, window=8, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (4, 20, 16))
    wanted = jax.jit(layer)(x)
    extend = jax.jit(lambda cache, x: layer.extend(x, cache))
    begin = jnp.array([2**16, 2**20, 2**24, 2**30], jnp.int32)
    cache, got = layer.init_cache(4).replace(position=begin), []
    for piece in (x[:, :13], x[:, 13:]):
        y, cache = extend(cache, piece)
        got.append(y)
    # Of what precedes the stream's first token, the first seven see something.
    assert_close(jnp.concatenate(got, axis=1)[:, 7:], wanted[:, 7:], 1e-5)
