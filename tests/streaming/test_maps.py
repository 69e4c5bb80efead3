"""Runs that compose: a full cache matches one pass over the same runs."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.streaming.eviction import DropOldest
from tests.cases import MEMORIES, assert_close, make_inputs
from tests.covers import kept_of
from tests.streams import empty, over_time

LENGTH, SIZE, MOST = 46, 4, 3
CASES = {
    "ssd": dict(rule="ssd", kind=mc.GRM()),
    "gla": dict(rule="gla", kind=mc.Residual()),
    "gated_deltanet": dict(rule="gated_deltanet", kind=mc.SSC(top_k=2)),
    "sums of keys": dict(rule="retnet", kind=mc.GRM(pooling="sum")),
    "checkpoint": dict(rule="titans", kind=mc.Soup(), start="checkpoint"),
}


@dataclasses.dataclass(frozen=True)
class ByAge(mc.Segmentation):
    """The segments that "compose_by_age" keeps, as a read plan."""

    size: int
    most: int

    def plan(self, length):
        """Merges the pair with the fewest segments for its age, before each block."""
        runs, reads = [], []
        for block in range(-(-length // self.size)):
            reads.append(list(runs))
            runs.append((block, block + 1))
            if len(runs) > self.most:
                ratios = [(b[1] - a[0]) / (block + 2 - b[1]) for a, b in itertools.pairwise(runs)]
                i = int(np.argmin(ratios))
                runs[i : i + 2] = [(runs[i][0], runs[i + 1][1])]
        return mc.ReadPlan.of(self.size, reads, np.arange(len(reads)))


@dataclasses.dataclass(frozen=True)
class Composes(DropOldest):
    composes: bool = True


def stream(inputs, rule, kind, start="independent", **options):
    memory = MEMORIES[rule]
    options = dict(segments=MOST, policy="compose_by_age") | options
    cache = empty(inputs, memory, kind, mc.Constant(SIZE), start, **options)
    step, outputs = jax.jit(mc.extend), []
    for begin in (0, 23):
        part = over_time(inputs, memory, lambda x, b=begin: x[:, b : b + 23])
        y, cache = step(cache, **part)
        outputs.append(y)
    return np.concatenate(outputs, axis=1), cache


def inputs_of(rule, **options):
    return jax.tree.map(jnp.asarray, make_inputs(MEMORIES[rule], LENGTH, heads=1, **options))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", kept_of(CASES, "gated_deltanet", fast=["ssd"]))
def test_a_full_cache_is_one_pass(case):
    inputs = inputs_of(case["rule"])
    got, cache = stream(inputs, **case)
    wanted = mc.memory_caching(
        **inputs,
        memory=MEMORIES[case["rule"]],
        aggregation=case["kind"],
        segmentation=ByAge(SIZE, MOST),
        start=case.get("start", "independent"),
        implementation="reference",
    )
    assert_close(got, wanted, 1e-10)
    assert np.asarray(cache.record.segments).sum(axis=1).tolist() == [LENGTH // SIZE] * 2


@pytest.mark.slow
def test_narrow_states():
    """Maps are rounded as states are."""
    inputs = inputs_of("gated_deltanet", dtype=np.float32)
    wanted, wide = stream(inputs, "gated_deltanet", mc.GRM())
    for dtype, error in (("bfloat16", 2e-2), ("int8", 4e-2)):
        got, cache = stream(inputs, "gated_deltanet", mc.GRM(), cache_dtype=dtype)
        assert_close(got, wanted, error)
        assert cache.nbytes < wide.nbytes


@pytest.mark.parametrize("rule", ["swla", "titans", "vector", "erasing"])
def test_rules_whose_runs_do_not_compose(rule):
    memory = MEMORIES[rule]
    how: Any = dict(memory=memory, aggregation=mc.GRM(), segmentation=mc.Constant(4))
    with pytest.raises(ValueError, match=f"composes runs: .*got {type(memory).__name__}"):
        mc.init_cache(1, 1, 4, 4, **how, max_segments=2, policy="compose_by_age")


def test_policies_that_compose_and_drop():
    how: Any = dict(memory=MEMORIES["ssd"], aggregation=mc.GRM(), segmentation=mc.Constant(4))
    with pytest.raises(ValueError, match="a policy that composes needs drops=False, got Composes"):
        mc.init_cache(1, 1, 4, 4, **how, max_segments=2, policy=Composes())
