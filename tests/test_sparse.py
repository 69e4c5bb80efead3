"""The router: what it takes, and what its reads cost."""

import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from tests.cases import MEMORIES, make_inputs, run


@pytest.mark.usefixtures("x64")
def test_router_takes_the_most_relevant_and_of_equals_the_older():
    cached = jnp.array([[1.0, 3.0, 3.0, 3.0, -jnp.inf]])
    gates, online = mc.SSC(top_k=2).gates(cached, jnp.array([3.0]))
    np.testing.assert_allclose(gates, [[0, 1 / 3, 1 / 3, 0, 0]])
    np.testing.assert_allclose(online, [1 / 3])
    gates, online = mc.SSC(top_k=2).gates(jnp.full((1, 3), -jnp.inf), jnp.array([3.0]))
    np.testing.assert_array_equal(gates, 0.0)
    np.testing.assert_array_equal(online, 1.0)


@pytest.mark.parametrize(
    "kind",
    [mc.SSC(top_k=2), mc.SSC(top_k=2, inner="soup"), mc.SSC(top_k=2, exact=8)],
    ids=["grm", "soup", "exact"],
)
def test_the_cost_of_a_routed_read_does_not_grow_with_the_segments(kind):
    from experiments._flops import count_flops

    memory = MEMORIES["titans"]

    def flops_per_token(segments):
        inputs = make_inputs(memory, 256 * segments, batch=1, heads=1)
        total = count_flops(lambda i: run(i, memory, kind, size=256), inputs)
        return total / (256 * segments)

    relevance = 2 * 4 * 16  # of 16 more segments to a token: the router's own cost
    assert flops_per_token(32) - flops_per_token(16) <= 1.1 * relevance
