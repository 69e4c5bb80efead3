"""Pooled keys and relevance against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.engine.run import candidates_of
from memcache_jax.gating import GATES, pooled_keys, running_keys, running_scores, scores
from memcache_jax.segmentation import ReadPlan
from tests.cases import assert_close, value_and_vjp

pytestmark = pytest.mark.usefixtures("x64")


def keys(blocks, size=5):
    return jax.random.normal(jax.random.key(0), (blocks, size, 3))


def relevance(connector, key, plan, gate="content"):
    """The scores of one head's blocks (n, c, ...)."""
    candidates = candidates_of(plan, key[None, None], key[None, None])
    cached, live = scores(connector[None, None], candidates, GATES[gate])
    return cached[0, 0], live[0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 5, 16, 37])
def test_running_mean(size):
    key, plan = np.asarray(keys(2, size)), mc.Constant(size).plan(2 * size)
    wanted = np.stack([np.mean(key[:, : t + 1], axis=1) for t in range(size)], axis=1)
    assert_close(running_keys(jnp.asarray(key), plan), wanted, 1e-12)
    counts = np.arange(1.0, size + 1)[None, :, None]
    assert_close(running_keys(jnp.asarray(key), plan, "sum"), wanted * counts, 1e-12)


@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_scores_without_running_keys(pooling):
    key, plan = keys(2, 37), mc.Constant(37).plan(74)
    connector = jnp.asarray(np.random.default_rng(1).standard_normal(key.shape))

    def plain(connector, key):
        return jnp.vecdot(connector, running_keys(key, plan, pooling))

    def fast(connector, key):
        return running_scores(plan, key[None, None], pooling, connector[None, None])[0, 0]

    got, wanted = (value_and_vjp(run, connector, key) for run in (fast, plain))
    assert_close(got, wanted, 1e-12)


def test_running_mean_goes_on_over_the_blocks_of_a_segment():
    key, plan = keys(5, 2), mc.Lengths((2, 6, 2)).plan(10)
    flat = np.asarray(key).reshape(10, 3)
    begins = [0, 0, *[2] * 6, 8, 8]
    for pooling, pool in (("mean", np.mean), ("sum", np.sum)):
        wanted = np.stack([pool(flat[begins[t] : t + 1], axis=0) for t in range(10)])
        assert_close(running_keys(key, plan, pooling).reshape(10, 3), wanted, 1e-12)


def test_a_later_key_reaches_no_earlier_block():
    key = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8, 2)))  # segments of 8 and 16
    broken = key.at[2, -1].set(jnp.nan)
    plan = mc.Lengths((8, 16)).plan(24)
    assert plan.num_blocks == 3
    got, wanted = (running_keys(x, plan) for x in (broken, key))
    np.testing.assert_array_equal(got[:2], wanted[:2])
    assert not np.isfinite(got[2, -1]).any()
    assert not np.isfinite(running_keys(key.at[1, 0].set(jnp.inf), plan)[2]).any()


def test_pooled_keys_of_longer_buckets():
    key = keys(4)
    plan = ReadPlan(5, np.array([[0, 1], [0, 2], [1, 4]]), np.full((4, 3), -1), np.arange(4))
    wanted = [key[0].mean(axis=0), key[:2].mean(axis=(0, 1)), key[1:].mean(axis=(0, 1))]
    assert_close(pooled_keys(key, plan), jnp.stack(wanted), 1e-12)
    sizes = jnp.array([5.0, 10.0, 15.0])[:, None]
    assert_close(pooled_keys(key, plan, "sum"), jnp.stack(wanted) * sizes, 1e-12)


@pytest.mark.slow
def test_relevance_of_any_plan():
    key, connector = keys(3), 2 + keys(3)
    reads = np.array([[-1, -1], [0, -1], [1, 0]])
    plan = ReadPlan(5, np.array([[0, 1], [1, 2]]), reads, np.arange(3))
    cached, online = relevance(connector, key, plan)
    pooled = key.mean(axis=1)
    for block in range(3):
        for slot in range(2):
            bucket = reads[block, slot]
            wanted = connector[block] @ pooled[bucket] if bucket >= 0 else jnp.full(5, -jnp.inf)
            np.testing.assert_allclose(cached[block, :, slot], wanted, rtol=1e-12)
    wanted = jnp.einsum("nck,nck->nc", connector, running_keys(key, plan))
    np.testing.assert_allclose(online, wanted, rtol=1e-12)


def test_position_gates_know_the_distance_alone():
    plan = mc.Logarithmic(5).plan(4 * 5)
    logits = jax.random.normal(jax.random.key(3), (4, 5, 3))
    cached, online = relevance(logits, keys(4), plan, gate="position")
    np.testing.assert_array_equal(online, logits[..., 0])
    np.testing.assert_array_equal(cached[1, :, 0], logits[1, :, 1])
    np.testing.assert_array_equal(cached[2, :, 0], logits[2, :, 1])  # [0, 2) ends at block 2
    np.testing.assert_array_equal(cached[3, :, 0], logits[3, :, 2])  # [0, 2), then [2, 3)
    np.testing.assert_array_equal(cached[3, :, 1], logits[3, :, 1])
    far, _ = relevance(logits[..., :2], keys(4), plan, gate="position")
    np.testing.assert_array_equal(far[3, :, 0], logits[3, :, 1])


def test_uniform_gates_are_one_over_the_number_visible():
    plan = mc.Constant(5).plan(3 * 5)
    gates = mc.GRM(gate="uniform").gates(*relevance(keys(3), keys(3), plan, gate="uniform"))
    np.testing.assert_allclose(gates[0][2], 1 / 3)
    np.testing.assert_allclose(gates[1], [[1.0] * 5, [1 / 2] * 5, [1 / 3] * 5])
