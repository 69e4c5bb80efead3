"""Unit lower triangular systems, against LAPACK."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.linalg import solve_triangular

from memcache_jax.kernels.triangular import solve_unit_lower
from tests.cases import assert_close, normals, value_and_vjp


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("size", [1, 2, 5, 16, 37])
def test_equals_lapack(size):
    normal = normals(size)
    system, sides = normal(3, size, size), normal(3, size, 4)

    def lapack(system, sides):
        below = jnp.eye(size) + jnp.tril(system, -1)
        return solve_triangular(below, sides, lower=True, unit_diagonal=True)

    got = value_and_vjp(jax.vmap(solve_unit_lower), system, sides)
    assert_close(got, value_and_vjp(jax.vmap(lapack), system, sides), 1e-9)


@pytest.mark.slow
def test_equal_keys_stay_exact():
    # Keys that are all the same and are corrected in full: powers of L grow as binomials do.
    solved = solve_unit_lower(jnp.ones((128, 128)), jnp.arange(128.0)[:, None])
    np.testing.assert_array_equal(solved[:, 0], np.minimum(np.arange(128), 1))
