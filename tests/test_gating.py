"""Pooled keys, relevance and gates against their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.engine.run import candidates_of
from memcache_jax.gating import GATES, pooled_keys, running_keys, scores
from memcache_jax.kernels.gate_softmax import softmax_gates
from memcache_jax.segmentation import ReadPlan
from tests.cases import (
    MEMORIES,
    SEGMENTATIONS,
    STARTS,
    Together,
    assert_close,
    make_inputs,
    scheduled,
)

pytestmark = pytest.mark.usefixtures("x64")


def keys(blocks, size=5):
    return jax.random.normal(jax.random.key(0), (blocks, size, 3))


def relevance(connector, key, plan, gate="content"):
    """The scores of one head's blocks (n, c, ...)."""
    candidates = candidates_of(plan, key[None, None])
    cached, live = scores(connector[None, None], candidates, GATES[gate])
    return cached[0, 0], live[0, 0]


@pytest.mark.parametrize("size", [1, 5, 16, 37])
def test_running_mean(size):
    key, plan = keys(2, size), mc.Constant(size).plan(2 * size)
    wanted = jnp.stack([key[:, : t + 1].mean(axis=1) for t in range(size)], axis=1)
    assert_close(running_keys(key, plan), wanted, 1e-12)
    counts = jnp.arange(1.0, size + 1)[None, :, None]
    assert_close(running_keys(key, plan, "sum"), wanted * counts, 1e-12)


def test_running_mean_goes_on_over_the_blocks_of_a_segment():
    key, plan = keys(5, 2), mc.Lengths((2, 6, 2)).plan(10)
    flat = key.reshape(10, 3)
    begins = [0, 0, *[2] * 6, 8, 8]
    for pooling, pool in (("mean", jnp.mean), ("sum", jnp.sum)):
        wanted = jnp.stack([pool(flat[begins[t] : t + 1], axis=0) for t in range(10)])
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


def test_gates_are_a_softmax_over_what_is_visible():
    cached = jnp.array([[1.0, -jnp.inf], [2.0, 0.5]])
    online = jnp.array([0.0, -1.0])
    gates = softmax_gates(cached, online)
    np.testing.assert_allclose(gates[0][0], [np.e / (1 + np.e), 0.0])
    np.testing.assert_allclose(gates[0].sum(axis=-1) + gates[1], 1.0)


@pytest.mark.parametrize("states", [0, 3])
def test_gates_have_the_slopes_of_a_softmax(states):
    scores, tangents = jax.random.normal(jax.random.key(0), (2, 4, states + 1))
    scores = scores.at[1:, : states - 1].set(-jnp.inf)

    def gates(scores):
        cached, online = softmax_gates(scores[:, :-1], scores[:, -1])
        return jnp.concatenate([cached, online[:, None]], axis=-1)

    def softmax(scores):
        return jax.nn.softmax(scores, axis=-1)

    def slopes(function):
        return jax.jvp(function, (scores,), (tangents,)), jax.vjp(function, scores)[1](tangents)

    assert_close(slopes(gates), slopes(softmax), 1e-14)


def test_residual_weighs_every_visible_state_by_one():
    gates = mc.Residual().gates(jnp.array([[0.0, -jnp.inf]]), jnp.array([0.0]))
    np.testing.assert_array_equal(gates[0], [[1.0, 0.0]])
    np.testing.assert_array_equal(gates[1], [1.0])


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


def test_router_takes_the_most_relevant_and_of_equals_the_older():
    cached = jnp.array([[1.0, 3.0, 3.0, 3.0, -jnp.inf]])
    gates, online = mc.SSC(top_k=2).gates(cached, jnp.array([3.0]))
    np.testing.assert_allclose(gates, [[0, 1 / 3, 1 / 3, 0, 0]])
    np.testing.assert_allclose(online, [1 / 3])
    gates, online = mc.SSC(top_k=2).gates(jnp.full((1, 3), -jnp.inf), jnp.array([3.0]))
    np.testing.assert_array_equal(gates, 0.0)
    np.testing.assert_array_equal(online, 1.0)


GATED = (("content", "mean"), ("content", "sum"), ("position", "mean"), ("uniform", "mean"))


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMORIES)
def test_every_rule_with_every_gate(name):
    """By the fast path as by the recurrence, the connector a vector of its own or the query."""
    memory, shift = MEMORIES[name], list(MEMORIES).index(name)
    inputs = make_inputs(memory, 14, batch=1, heads=1)
    ssc = functools.partial(mc.SSC, top_k=2)
    kinds = mc.GRM, mc.Soup, ssc, functools.partial(ssc, inner="soup")

    @jax.jit
    def outputs(inputs):
        got, wanted = [], []
        for i, (start, segmentation) in enumerate(zip(STARTS, SEGMENTATIONS.values(), strict=True)):
            together = Together(
                tuple(
                    kinds[(shift + i + j) % 4](gate=gate, pooling=pooling)
                    for j, (gate, pooling) in enumerate(GATED)
                )
            )
            run = functools.partial(
                mc.memory_caching,
                **inputs,
                memory=memory,
                segmentation=segmentation(4),
                start=start,
            )
            got.append(run(aggregation=together))
            each = (run(aggregation=kind, implementation="reference") for kind in together.kinds)
            wanted.append(together.scaled(each))
        return got, wanted

    with scheduled("in_turn"):
        for connector in ("connector", "query"):
            got, wanted = outputs({**inputs, "connector": inputs[connector]})
            assert_close(got, wanted, 1e-12)
