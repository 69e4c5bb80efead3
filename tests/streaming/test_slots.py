"""The order in which slots are read."""

import jax
import jax.numpy as jnp
import numpy as np

import memcache_jax as mc
from tests.cases import MEMORIES


def test_of_equally_relevant_states_the_older_is_read():
    memory = MEMORIES["linear"]
    cache = mc.init_cache(
        *(1, 1, 1, 1),
        memory=memory,
        aggregation=mc.SSC(gate="uniform", top_k=1),
        segmentation=mc.Constant(1),
        max_segments=2,
        policy="drop_oldest",
    )
    one, step = jnp.ones((1, 1, 1, 1)), jax.jit(mc.extend)
    outputs = []
    for t in range(5):
        y, cache = step(cache, one, one, one * 10.0**t)
        outputs.append(y.item())
    # Of the segments 2 and 3, which are kept, and the live one, 4.
    np.testing.assert_allclose(outputs[-1], (1e2 + 1e4) / 2, rtol=1e-6)
