"""Gates of aggregations, and aggregations of a user's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from tests.cases import assert_close, make_inputs


@pytest.mark.usefixtures("x64")
def test_residual_weighs_every_visible_state_by_one():
    gates = mc.Residual().gates(jnp.array([[0.0, -jnp.inf]]), jnp.array([0.0]))
    np.testing.assert_array_equal(gates[0], [[1.0, 0.0]])
    np.testing.assert_array_equal(gates[1], [1.0])


@pytest.mark.slow
def test_an_aggregation_that_reads_the_live_memory_its_own_way():
    class Halved(mc.Residual):
        def needs(self, memory):
            return ("layers",)

        def read(self, bank, live, query, selection):
            own = bank.memory.forward(live.apply, query / 2)
            return own + bank.read(query, selection)

    memory = mc.memories.SSD()
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 24, batch=1, heads=1, dtype=np.float32))
    run = functools.partial(mc.memory_caching, memory=memory, segmentation=mc.Constant(24))
    wanted = run(**inputs | {"query": inputs["query"] / 2}, aggregation=mc.Residual())
    assert_close(run(**inputs, aggregation=Halved()), wanted, 1e-6)
