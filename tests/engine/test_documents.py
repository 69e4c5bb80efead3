"""Packed documents: running keys, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.engine.documents import running_document_keys
from memcache_jax.segmentation import ReadPlan
from tests.cases import MEMORIES, assert_close, make_inputs

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


@pytest.mark.parametrize("first", [range(6), (0, 0, 0, 3, 3, 5)], ids=["each", "several"])
@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_running_keys_begin_anew_with_segments_and_documents(first, pooling):
    none, size = np.full((6, 0), -1), 37
    plan = ReadPlan(size, np.zeros((0, 2), int), none, np.asarray(first))
    key = np.random.default_rng(0).standard_normal((6, size, 3)).astype(np.float32)
    begins = np.isin(np.arange(6 * size), [20, 21, 74, 140])
    number = np.cumsum(begins)
    begins |= np.repeat(plan.begins, size) & (np.arange(6 * size) % size == 0)
    wanted, past = [], []
    for begin, row in zip(begins, key.reshape(-1, 3).astype(float), strict=True):
        past = [row] if begin else [*past, row]
        wanted.append(np.mean(past, axis=0) if pooling == "mean" else np.sum(past, axis=0))
    document = jnp.asarray(number.reshape(6, size), jnp.int32)
    run = jax.jit(lambda key, document: running_document_keys(key, plan, pooling, document))
    assert_close(run(jnp.asarray(key), document).reshape(-1, 3), np.stack(wanted), 1e-6)
