"""Products of decays, against their definition."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memcache_jax.kernels.decay import channel_scores, decay_matrix, end_decay
from memcache_jax.kernels.triangular import in_whole_matrices
from tests.cases import assert_close, normals, value_and_vjp


@pytest.mark.usefixtures("x64")
def test_decay_matrix():
    log_decay = -jax.random.uniform(jax.random.key(0), (7,)) * 20
    got = decay_matrix(log_decay)
    for t in range(7):
        for j in range(7):
            wanted = np.exp(log_decay[j + 1 : t + 1].sum()) if j <= t else 0.0
            np.testing.assert_allclose(got[t, j], wanted, rtol=1e-12)


def test_decay_matrix_keeps_small_decays_after_strong_ones():
    log_decay = jnp.array([-1e4, -1e4, -1e-3, -1e-3], jnp.float32)
    np.testing.assert_allclose(decay_matrix(log_decay)[3, 1], np.exp(-2e-3), rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("size", [1, 6, 16])
def test_channels_in_whole_matrices(size):
    normal = normals(size)
    log_decay = -np.abs(5 * normal(size, 3))
    log_decay[size // 2] = -1e4
    rows = normal(2, size, 3), normal(2, size, 3), log_decay

    def both(reads, keys, log_decay):
        return channel_scores(reads, keys, log_decay), end_decay(log_decay)

    wanted = value_and_vjp(both, *rows)
    with in_whole_matrices():
        assert_close(value_and_vjp(lambda *rows: both(*rows), *rows), wanted, 1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("whole", [False, True])
def test_channels_scores_are_products_with_decays_between(whole):
    normal = normals(1)
    reads, keys = jnp.asarray(normal(2, 6, 3)), jnp.asarray(normal(2, 6, 3))
    log_decay = (-jnp.abs(jnp.asarray(normal(6, 3)))).at[3, 1].set(-jnp.inf)
    with in_whole_matrices() if whole else contextlib.nullcontext():
        got = channel_scores(reads, keys, log_decay)
    for t in range(6):
        for j in range(6):
            between = jnp.exp(log_decay[j + 1 : t + 1].sum(axis=0)) if j <= t else jnp.zeros(3)
            wanted = np.einsum("rk,wk,k->rw", reads[:, t], keys[:, j], between)
            np.testing.assert_allclose(got[:, :, t, j], wanted, rtol=1e-12)
