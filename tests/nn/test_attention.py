"""Attention: against its equation, its window, and rotary positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from memcache_jax.nn.attend import rotate
from tests.cases import assert_close


def equation(layer, x):
    """Softmax attention, one query and head at a time."""
    split = lambda y: y.reshape(*y.shape[:2], layer.num_heads, layer.head_dim)  # noqa: E731
    query, key = (rotate(split(f(x)), layer.rope_base) for f in (layer.query, layer.key))
    value = split(layer.value(x))
    rows = []
    for t in range(x.shape[1]):
        first = 0 if layer.window is None else max(0, t - layer.window + 1)
        scores = jnp.einsum("bhk,bjhk->bhj", query[:, t], key[:, first : t + 1])
        weights = jax.nn.softmax(scores / layer.head_dim**0.5, axis=-1)
        rows.append(jnp.einsum("bhj,bjhv->bhv", weights, value[:, first : t + 1]))
    y = jnp.stack(rows, axis=1)
    return layer.out(y.reshape(*x.shape[:2], -1))


@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_equals_its_equation(window):
    layer = mc.nn.Attention(16, 2, window=window, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 13, 16))
    assert_close(layer(x), equation(layer, x), 1e-5)


def test_rotary_scores_depend_on_distance_alone():
    query, key = jax.random.normal(jax.random.key(0), (2, 8))
    here = lambda x: rotate(jnp.tile(x[None, None, None], (1, 30, 1, 1)), 100.0)[0, :, 0]  # noqa: E731
    scores = np.asarray(here(query) @ here(key).T)
    for distance in range(5):
        diagonal = np.diagonal(scores, -distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
    assert abs(scores[1, 0] - scores[2, 0]) > 1e-3


def test_rotation_keeps_precision_far_from_the_start():
    x = jnp.ones((1, 5000, 1, 4), jnp.bfloat16)
    y = rotate(x, 10_000.0)
    assert y.dtype == jnp.bfloat16
    assert_close(y.astype(jnp.float32), rotate(x.astype(jnp.float32), 10_000.0), 1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_heads=3), "num_heads=3 must divide in_features=16"),
        (dict(head_dim=5), "even head_dim, got 5"),
        (dict(window=0), "window must be at least 1, got 0"),
    ],
)
def test_arguments_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        mc.nn.Attention(16, **(dict(num_heads=2) | options), rngs=nnx.Rngs(0))
