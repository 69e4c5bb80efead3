"""Classes that derive from a finished rule: which form they have."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from tests.cases import assert_close, make_inputs

RULES = [
    *(mc.memories.LinearAttention(), mc.memories.RetNet(), mc.memories.SSD(), mc.memories.SWLA()),
    *(mc.memories.GLA(), mc.memories.DeltaNet(), mc.memories.GatedDeltaNet(), mc.memories.KDA()),
    *(mc.memories.GDN2(), mc.memories.RWKV7(), mc.memories.Vector(), mc.memories.Titans()),
]


class Doubled(mc.memories.SSD):
    def forward(self, apply, query, gate=None):
        return super().forward(apply, 2 * query, gate)


class FromOnes(mc.memories.SSD):
    def init(self, weights, key_dim, value_dim, dtype):
        state = super().init(weights, key_dim, value_dim, dtype)
        return jax.tree.map(jnp.ones_like, state)


class Both:
    def affine(self, before, key, value, query, controls):
        owner: Any = super()
        return owner.affine(before, key, value, query, controls)


class Mixed(Both, mc.memories.SSD):
    pass


def test_kernels_trace_the_maps_of_finished_rules_alone():
    class Own(mc.memories.GatedDeltaNet):
        pass

    assert mc.memories.GatedDeltaNet.on_chip
    assert not Own.on_chip


def test_zeros_fill_chunks_of_finished_rules_alone():
    class Own(mc.memories.GatedDeltaNet):
        pass

    exact = [rule for rule in RULES if rule.gradient_chunk is None]
    assert len(exact) == 11
    assert all(rule.takes_padding for rule in exact)
    assert not Own.takes_padding


@pytest.mark.slow
@pytest.mark.parametrize("memory", [Doubled(), FromOnes(), Mixed()], ids=lambda x: type(x).__name__)
def test_a_class_that_does_something_its_own_way_is_served_by_its_own_methods(memory):
    assert mc.memories.SSD().form == "affine"
    assert memory.form != "affine"
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 24, batch=1, heads=1, dtype=np.float32))
    run = functools.partial(
        mc.memory_caching,
        **inputs,
        memory=memory,
        aggregation=mc.Residual(),
        segmentation=mc.Constant(8),
    )
    assert_close(run(), run(implementation="reference"), 1e-6)
