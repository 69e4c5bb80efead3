"""Eviction policies against their definition."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from tests.cases import MEMORIES, assert_close, make_inputs
from tests.covers import product
from tests.streams import empty, over_time


def kept_by_hand(inputs, size, most, policy):
    """Linear attention with GRM, one row and head, in NumPy: the outputs under a policy."""
    query, key, value, connector = (
        np.asarray(inputs[name])[0, :, 0] for name in ("query", "key", "value", "connector")
    )
    cached, state, keys, outputs = [], 0, 0, []
    for t in range(len(key)):
        state, keys = state + np.outer(value[t], key[t]), keys + key[t]
        pooled = [*(c["pooled"] for c in cached), keys / (t % size + 1)]
        counts = [*(1 if policy == "compose_by_age" else c["count"] for c in cached), 1]
        weights = counts * np.exp(np.stack(pooled) @ connector[t])
        weights /= weights.sum()
        states = [*(c["state"] for c in cached), state]
        outputs.append(sum(w * m @ query[t] for w, m in zip(weights, states, strict=True)))
        for c, weight in zip(cached, weights, strict=False):
            c["gates"] += weight
        if (t + 1) % size:
            continue
        new = dict(state=state, pooled=keys / size, count=1, gates=0.0, newest=t // size)
        cached, state, keys = [*cached, new], 0, 0
        if len(cached) <= most:
            continue
        if policy == "drop_oldest":
            cached = cached[1:]
        elif policy == "drop_least_read":
            mean = [c["gates"] / (t // size - c["newest"]) for c in cached[:-1]]
            del cached[int(np.argmin(mean))]
        else:
            sizes = np.array([a["count"] + b["count"] for a, b in itertools.pairwise(cached)])
            if policy != "merge":
                sizes = sizes / [t // size + 1 - c["newest"] for c in cached[1:]]
            i = int(np.argmin(sizes))
            one, two = cached[i : i + 2]
            total = one["count"] + two["count"]
            mixed = {
                name: (one["count"] * one[name] + two["count"] * two[name]) / total
                for name in ("state", "pooled")
            }
            if policy == "compose_by_age":
                mixed["state"] = one["state"] + two["state"]
            cached[i : i + 2] = [dict(two, count=total, **mixed)]
    return np.stack(outputs)[None, :, None]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("policy", "most"),
    product(
        ["drop_oldest", "drop_least_read", "merge", "merge_by_age", "compose_by_age"],
        [3, 1],
        turn=0,
    ),
)
def test_bounded_memory(policy, most):
    memory = MEMORIES["linear"]
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 50, batch=1, heads=1))
    cache = empty(inputs, memory, mc.GRM(), mc.Constant(4), segments=most, policy=policy)
    outputs, step = [], jax.jit(mc.extend)
    for begin in range(0, 50, 10):
        y, cache = step(cache, **over_time(inputs, memory, lambda x, b=begin: x[:, b : b + 10]))
        outputs.append(y)
    assert cache.pooled.shape[2] == most
    assert_close(np.concatenate(outputs, axis=1), kept_by_hand(inputs, 4, most, policy), 1e-12)
