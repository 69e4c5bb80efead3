"""Unit lower triangular systems, against LAPACK."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.linalg import solve_triangular

from memcache_jax.kernels.triangular import in_whole_matrices, solve_unit_lower
from tests.cases import assert_close, normals, value_and_vjp

WAYS = {"blocks": contextlib.nullcontext, "whole": in_whole_matrices}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1, 2, 5, 16, 37])
def test_equals_lapack(size, way):
    normal = normals(size)
    system, sides = normal(3, size, size), normal(3, size, 4)

    def lapack(system, sides):
        below = jnp.eye(size) + jnp.tril(system, -1)
        return solve_triangular(below, sides, lower=True, unit_diagonal=True)

    with WAYS[way]():
        got = value_and_vjp(jax.vmap(solve_unit_lower), system, sides)
    assert_close(got, value_and_vjp(jax.vmap(lapack), system, sides), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_equal_keys_stay_exact(way):
    # Keys that are all the same and are corrected in full: powers of L grow as binomials do.
    with WAYS[way]():
        solved = solve_unit_lower(jnp.ones((128, 128)), jnp.arange(128.0)[:, None])
    np.testing.assert_array_equal(solved[:, 0], np.minimum(np.arange(128), 1))
