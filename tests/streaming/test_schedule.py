"""How many slots a read plan needs."""

import jax
import jax.numpy as jnp

import memcache_jax as mc
from tests.cases import MEMORIES, make_inputs
from tests.streams import empty


def test_logarithmic_caches_keep_log_n_states():
    inputs = jax.tree.map(jnp.asarray, make_inputs(MEMORIES["linear"], 1))
    cache = empty(inputs, MEMORIES["linear"], mc.GRM(), mc.Logarithmic(4), segments=1000)
    assert cache.pooled.shape[2] == 9  # no number up to 1000 has more ones in base 2
    assert cache.nbytes == sum(x.nbytes for x in jax.tree.leaves(cache))
