"""Rows of a cache that begin anew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from tests.cases import MEMORIES, assert_close, make_inputs
from tests.streams import empty, over_time, whole


@pytest.mark.slow
@pytest.mark.parametrize("kind", [mc.GRM(), mc.SSC(top_k=1)], ids=["grm", "ssc"])
def test_a_row_that_begins_anew_forgets_what_is_not_a_number(kind):
    memory = MEMORIES["linear"]
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 20, dtype=jnp.float32))
    cache, step = empty(inputs, memory, kind, mc.Constant(4)), jax.jit(mc.extend, donate_argnums=0)
    broken = over_time(inputs, memory, lambda x: x.at[0].set(jnp.nan))
    _, cache = step(cache, **broken)
    cache = cache.reset(np.array([True, True]))
    kept = cache.take(np.array([1, 0]))  # which the next step leaves alone
    y, _ = step(cache, **over_time(inputs, memory, lambda x: x))
    assert_close(y, whole(inputs, memory, kind, mc.Constant(4)), 1e-5)
    y, _ = step(kept, **over_time(inputs, memory, lambda x: x[::-1]))
    assert jnp.isfinite(y).all()
