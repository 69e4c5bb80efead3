"""Numbers that are not finite, in runs that compose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.engine.finite import composed
from memcache_jax.memories.affine import MatrixState
from memcache_jax.memories.base import Run


@pytest.mark.parametrize("spoilt", [False, True])
def test_a_spoilt_run_spoils_what_follows_and_no_gradient(spoilt):
    memory, value = mc.memories.GatedDeltaNet(), np.nan if spoilt else 1.0
    first = MatrixState(jnp.full((2, 3), value))

    def after(transition, matrix, read):
        run = composed(memory, Run(first, None), Run(MatrixState(matrix), transition))
        return jnp.where(read, run.state.matrix, 0.0).sum()

    arguments = jnp.eye(2), jnp.ones((2, 3))
    assert bool(jnp.isnan(after(*arguments, True))) == spoilt
    for gradient in jax.grad(after, (0, 1))(*arguments, False):
        np.testing.assert_array_equal(gradient, 0.0)
