"""Changes in loops: those of selections, forward and backward."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memcache_jax.streaming import in_place

ROWS = jnp.array([False, True, False, True])


def change(x, y, z):
    return x * y + z


@pytest.mark.parametrize("way", ["_one_by_one", "_all_if_any", "_selected_rows"])
def test_marked_rows_change_and_no_others(way):
    x, y, z = jax.random.normal(jax.random.key(0), (3, 4, 2))
    run = jax.jit(functools.partial(getattr(in_place, way), change))
    got = run(ROWS, x, (y,), (z[0],))
    wanted = jnp.where(ROWS[:, None], x * y + z[:1], x)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(run(jnp.zeros(4, bool), x, (y,), (z[0],)), x)


def test_no_array_is_copied_for_a_row():
    """Each row's new values depend on all of its arrays, which are written in place."""

    def change(arrays, factor):
        weights, momentum = arrays
        product = weights @ factor
        return weights + momentum - product, momentum + product

    def run(rows, arrays, factors):
        return in_place._one_by_one(change, rows, arrays, (factors,), ())

    x = jnp.zeros((4, 8, 8))
    text = str(jax.jit(run, donate_argnums=1).lower(ROWS, (x, x), x).compile().as_text())
    assert "f32[4,8,8]" in text
    assert not re.search(r"= f32\[4,8,8\]\S* copy\(", text)


def test_derivatives():
    x, y, z = jax.random.normal(jax.random.key(0), (3, 4, 2))

    def of_rows(x, y, z):
        return jnp.sum(in_place.change_rows(change, ROWS, x, (y,), (z,)) ** 2)

    got = jax.jit(jax.grad(of_rows, argnums=(0, 1, 2)))(x, y, z[0])
    wanted = jax.grad(
        lambda x, y, z: jnp.sum(jnp.where(ROWS[:, None], x * y + z[None], x) ** 2),
        argnums=(0, 1, 2),
    )(x, y, z[0])
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


def test_if():
    x = jnp.arange(3.0)

    def add(x, more):
        return x + more

    run = jax.jit(functools.partial(in_place.change_if, add))
    np.testing.assert_array_equal(run(jnp.array(True), x, (jnp.ones(3),)), x + 1)
    np.testing.assert_array_equal(run(jnp.array(False), x, (jnp.zeros(3),)), x)
    gradient = jax.grad(lambda x: in_place.change_if(add, x[1] > 0, x, (x,)).sum())(x)
    np.testing.assert_array_equal(gradient, 2 * jnp.ones(3))
