"""Products of decays, against their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memcache_jax.kernels.decay import decay_matrix


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
