"""Pooled keys, relevance and gates against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.gating import pooled_keys, relevance, running_mean_keys, softmax_gates
from memcache_jax.segmentation import ReadPlan
from tests.cases import assert_close

pytestmark = pytest.mark.usefixtures("x64")


def keys(blocks, size=5):
    return jax.random.normal(jax.random.key(0), (blocks, size, 3))


@pytest.mark.parametrize("size", [1, 5, 16, 37])
def test_running_mean(size):
    key = keys(2, size)
    wanted = jnp.stack([key[:, : t + 1].mean(axis=1) for t in range(size)], axis=1)
    assert_close(running_mean_keys(key), wanted, 1e-12)


def test_pooled_keys_of_longer_buckets():
    key = keys(4)
    plan = ReadPlan(5, np.array([[0, 1], [0, 2], [1, 4]]), np.full((4, 3), -1))
    wanted = [key[0].mean(axis=0), key[:2].mean(axis=(0, 1)), key[1:].mean(axis=(0, 1))]
    assert_close(pooled_keys(key, plan), jnp.stack(wanted), 1e-12)


def test_relevance_of_any_plan():
    key, connector = keys(3), 2 + keys(3)
    reads = np.array([[-1, -1], [0, -1], [1, 0]])
    plan = ReadPlan(5, np.array([[0, 1], [1, 2]]), reads)
    cached, online = relevance(connector, key, plan)
    pooled = key.mean(axis=1)
    for block in range(3):
        for slot in range(2):
            bucket = reads[block, slot]
            wanted = connector[block] @ pooled[bucket] if bucket >= 0 else jnp.full(5, -jnp.inf)
            np.testing.assert_allclose(cached[block, :, slot], wanted, rtol=1e-12)
    wanted = jnp.einsum("nck,nck->nc", connector, running_mean_keys(key))
    np.testing.assert_allclose(online, wanted, rtol=1e-12)


def test_gates_are_a_softmax_over_what_is_visible():
    cached = jnp.array([[1.0, -jnp.inf], [2.0, 0.5]])
    online = jnp.array([0.0, -1.0])
    gates = softmax_gates(cached, online)
    np.testing.assert_allclose(gates[0][0], [np.e / (1 + np.e), 0.0])
    np.testing.assert_allclose(gates[0].sum(axis=-1) + gates[1], 1.0)


def test_residual_weighs_every_visible_state_by_one():
    gates = mc.Residual().gates(jnp.array([[0.0, -jnp.inf]]), jnp.array([3.0]))
    np.testing.assert_array_equal(gates[0], [[1.0, 0.0]])
    np.testing.assert_array_equal(gates[1], [1.0])
