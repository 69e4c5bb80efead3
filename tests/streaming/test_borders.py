"""Returning to where a segment begins: a cache goes on as if what came after never had."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from tests.cases import MEMORIES, make_inputs
from tests.covers import kept_of, rules
from tests.streaming.test_past import extend_all, without_none
from tests.streams import over_time

KINDS: dict[str, Any] = {
    "grm": dict(),
    "lengths": dict(segmentation=mc.Lengths((4, 8, 4, 8)), segments=None, max_length=22),
}
CHECKPOINT: dict[str, Any] = {
    name: options | dict(start="checkpoint") for name, options in KINDS.items()
}
OTHERS: dict[str, Any] = {
    "ssc": dict(aggregation=mc.SSC(top_k=2), policy="drop_oldest", segments=4, rewind=3),
    "residual": dict(aggregation=mc.Residual(), policy="merge", segments=4, cache_dtype="bfloat16"),
    "host": dict(aggregation=mc.SSC(top_k=1), placement="host"),
}


def go_back(rule, kinds):
    memory = MEMORIES[rule]
    inputs = make_inputs(memory, 22, batch=3, heads=2, dtype=np.float32)
    inputs = jax.tree.map(jnp.asarray, inputs)

    def tokens(begin):
        return over_time(inputs, memory, lambda x: x[:, begin : begin + 11])

    made = {}
    for name, options in kinds.items():
        options = dict(aggregation=mc.GRM(), segmentation=mc.Constant(4), segments=5) | options
        made[name] = without_none(inputs, memory, **options)
    begin = jnp.array([4, 4, 0])
    _, before = extend_all(made, tokens(0), begin)
    spoilt = over_time(inputs, memory, lambda x: x[:, 11:].at[:, 3:].set(jnp.nan))
    _, after = extend_all(before, spoilt, jnp.array([11, 1, 10]))
    rows = jnp.array([True, False, True])
    back = jax.jit(lambda caches: {n: c.returned(begin, rows) for n, c in caches.items()})(after)
    assert all(whole.all() for _, whole in back.values())
    got = {name: cache for name, (cache, _) in back.items()}
    wanted, _ = extend_all(before, tokens(3), jnp.full(3, 11))
    for name, y in extend_all(got, tokens(3), jnp.full(3, 11))[0].items():
        np.testing.assert_array_equal(y[::2], wanted[name][::2], name)
        assert got[name].position.tolist() == [4, 5, 0]
        np.testing.assert_array_equal(
            got[name].borders(9), [0, 4] if name == "lengths" else [0, 4, 8]
        )


@pytest.mark.parametrize("rule", rules(1, "linear"))
def test_every_rule(rule):
    go_back(rule, KINDS)


@pytest.mark.parametrize("rule", kept_of(["linear", "gated_deltanet", "vector"], "gated_deltanet"))
def test_states_that_go_on(rule):
    go_back(rule, CHECKPOINT)


@pytest.mark.slow
def test_every_other_cache():
    go_back("ssd", OTHERS)


def test_what_is_not_kept():
    """States that a policy has dropped, and what no cache keeps, by name."""
    titans = mc.memories.Titans(chunk_size=4, expansion=1)
    sizes: Any = dict(batch=2, heads=1, key_dim=4, value_dim=4)
    weights = dict(W1=jnp.zeros((1, 4, 4)), W2=jnp.zeros((1, 4, 4)))
    linear: Any = dict(memory=MEMORIES["linear"], aggregation=mc.GRM())
    constant: Any = linear | dict(segmentation=mc.Constant(4), max_segments=2)
    for options, message in (
        (linear | dict(segmentation=mc.Logarithmic(4), max_length=40), "buckets over several"),
        (constant | dict(policy="drop_least_read"), "'drop_least_read' adds up the gates"),
        (constant | dict(memory=titans, weights=weights, start="checkpoint"), "without momentum"),
        (constant | dict(start="checkpoint", cache_dtype="bfloat16"), "in bfloat16"),
    ):
        with pytest.raises(ValueError, match=f"cannot return to a segment's begin: .*{message}"):
            mc.init_cache(**sizes, **options).borders(8)
    cache = mc.init_cache(**sizes, **constant, policy="drop_oldest")
    rows = jnp.ones((2, 10, 1, 4))
    _, cache = mc.extend(cache, rows, rows, rows, rows, lengths=jnp.array([10, 10]))
    _, cache = mc.extend(cache, rows, rows, rows, rows, lengths=jnp.array([3, 1]))
    _, whole = cache.returned(jnp.array([8, 8]), jnp.array([True, True]))
    assert whole.tolist() == [False, True]
