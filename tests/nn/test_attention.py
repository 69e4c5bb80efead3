"""Attention against its equation."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import memcache_jax as mc
from memcache_jax.nn.rotary import rotate
from tests.cases import assert_close
from tests.covers import first_kept


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


@pytest.mark.parametrize("window", first_kept(2, [None, 4, 1, 100]))
def test_equals_its_equation(window):
    layer = mc.nn.Attention(16, 2, window=window, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 13, 16))
    y, wanted = nnx.jit(lambda layer, x: (layer(x), equation(layer, x)))(layer, x)
    assert_close(y, wanted, 1e-5)


@pytest.mark.parametrize(("window", "length"), first_kept(1, [(4, 140), (4, 10), (None, 10)]))
def test_a_stream_ends_where_positions_do(window, length):
    layer = mc.nn.Attention(16, 2, window=window, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, length, 16))
    extend = jax.jit(layer.extend)
    wanted, empty = jax.jit(layer)(x), layer.init_cache(2, length)
    far = 2**31 - 1 - (0 if window is None else length - 2)
    last = empty.replace(position=jnp.array([far, 0], jnp.int32))
    with pytest.raises(ValueError, match="a row"):
        layer.extend(x, last)
    y, ended = extend(x, last)
    some = slice(3, -2) if window else slice(0)  # before it, a window has keys of zero
    assert_close(y[0, some], wanted[0, some], 1e-5)
    assert jnp.isnan(y[0, -2:]).all()
    assert_close(y[1], wanted[1], 1e-5)
    assert jnp.isnan(extend(x, ended)[0][0]).all()


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
