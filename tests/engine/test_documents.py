"""Packed documents: what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from tests.cases import MEMORIES, make_inputs

CONSTANT = mc.Constant(8)


class Overlapping(mc.Constant):
    """Buckets of the last three blocks, which no document's start can shift."""

    def plan(self, length):
        plan = super().plan(length)
        buckets = np.maximum(plan.buckets - [[2, 0]], 0)
        return dataclasses.replace(plan, buckets=buckets)


@functools.partial(jax.jit, static_argnums=2)
def packed(inputs, ids, segmentation=CONSTANT):
    return mc.memory_caching(
        **inputs,
        memory=MEMORIES["linear"],
        aggregation=mc.GRM(),
        segmentation=segmentation,
        document_ids=ids,
    )


@pytest.mark.usefixtures("unchecked")
def test_errors():
    inputs = jax.tree.map(jnp.asarray, make_inputs(MEMORIES["linear"], 8))
    with pytest.raises(ValueError, match=r"document_ids must be integers .*\(2, 8\), got .*7"):
        packed(inputs, jnp.zeros((2, 7), int))
    with pytest.raises(ValueError, match=r"document_ids must be integers .*float32"):
        packed(inputs, jnp.zeros((2, 8)))
    with pytest.raises(ValueError, match=r"begin at a multiple of 2\^p, got Overlapping"):
        packed(inputs, jnp.zeros((2, 8), int), Overlapping(2))
