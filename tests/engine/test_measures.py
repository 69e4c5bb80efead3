"""Errors of blocks, against the token by token reference and a plain loop."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.engine.documents import count_documents
from memcache_jax.engine.measures import relative_error
from memcache_jax.engine.one_pass import find_all_borders
from memcache_jax.engine.run import full_controls, heads_first, writing
from tests.cases import COVER, make_inputs
from tests.covers import kept_of
from tests.engine.test_borders import keys_of_topics

LENGTH = 45
SEGMENTATION = mc.Adaptive(8, 16, 0.1, block=4, by="errors")
IDS = np.array([[0] * 12 + [1] * 33, [0] * 7 + [1] * 3 + [2] * 35])


@functools.partial(jax.jit, static_argnames=("memory", "start", "implementation"))
def borders_of(inputs, memory, ids=None, start: Any = "independent", implementation=None):
    controls = full_controls(memory, inputs["controls"], inputs["key"], inputs["value"])
    given = {name: inputs[name] for name in ("query", "key", "value", "connector")}
    tokens = heads_first(**given, controls=controls)
    how = writing(memory, mc.GRM(), tokens, inputs["weights"], implementation)
    document = None if ids is None else count_documents(ids)
    borders = find_all_borders(SEGMENTATION, tokens, inputs["weights"], document, how, start)
    return borders.of_tokens(LENGTH)


def inputs_of(memory):
    inputs = make_inputs(memory, LENGTH, heads=2, dtype=np.float64)
    inputs["key"] = keys_of_topics(3, length=LENGTH)
    return inputs


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rule", kept_of([*COVER], "titans", "vector", fast=["gated_deltanet"]))
def test_borders_are_those_of_the_reference(rule):
    memory = COVER[rule]
    inputs = inputs_of(memory)
    inputs["value"][1, 20, 0, 0] = np.nan  # a NaN error surprises no more
    cases: Any = ((None, "checkpoint"), (jnp.asarray(IDS), "independent"))
    for ids, start in cases:
        fast, plain = (borders_of(inputs, memory, ids, start, how) for how in (None, "reference"))
        np.testing.assert_array_equal(fast, plain)
        assert fast[0, -1] > (0 if ids is None else 1)


@pytest.mark.usefixtures("x64")
def test_borders_are_those_of_a_loop():
    memory = mc.memories.LinearAttention()
    inputs = inputs_of(memory)
    found = np.asarray(borders_of(inputs, memory))
    for row in range(2):
        key, value = inputs["key"][row], inputs["value"][row]
        state, blocks, segment, wanted = np.zeros((2, value.shape[-1], key.shape[-1])), [], 0, []
        for begin in range(0, LENGTH, 4):
            errors = []
            for k, v in zip(key[begin : begin + 4], value[begin : begin + 4], strict=True):
                missed = v - np.einsum("hvk,hk->hv", state, k)
                errors.append(np.mean(np.sum(missed**2, axis=-1) / np.sum(v**2, axis=-1)))
                state += np.einsum("hv,hk->hvk", v, k)
                wanted.append(segment)
            surprise = 1 - np.mean(blocks) / np.mean(errors) if blocks else 0
            blocks.append(np.mean(errors))
            if len(blocks) == 4 or (len(blocks) >= 2 and surprise > SEGMENTATION.threshold):
                state, blocks, segment = np.zeros_like(state), [], segment + 1
        np.testing.assert_array_equal(found[row], wanted)


def test_values_of_zero_are_no_error():
    value, recalled = jnp.array([[0.0, 0.0], [3.0, 4.0]]), jnp.array([[1.0, 2.0], [0.0, 4.0]])
    np.testing.assert_allclose(relative_error(value, recalled), [0, 9 / 25], rtol=1e-6)
