"""Segments that the tokens decide: every path agrees with segments given by hand."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from memcache_jax.engine import one_pass
from memcache_jax.engine.borders import find_borders
from memcache_jax.sharding import make_mesh
from tests.cases import (
    AGGREGATIONS,
    FAMILIES,
    MEMORIES,
    assert_close,
    make_inputs,
    scheduled,
    value_and_vjp,
)
from tests.covers import kept_of
from tests.engine.test_borders import keys_of_topics, segments_of
from tests.streams import empty, over_time

SEGMENTATION = mc.Adaptive(8, 16, 0.5, block=4)
LENGTH = 45
IDS = np.array([[0] * 12 + [1] * 33, [0] * 7 + [1] * 3 + [2] * 35])
CASES = (("grm", "independent"), ("ssc", "checkpoint"))
EACH = (*CASES, ("residual", "independent"), ("soup", "checkpoint"))


def topics(memory, dtype: Any = np.float64, **sizes):
    """Inputs whose keys turn from time to time, in each row elsewhere."""
    inputs = make_inputs(memory, LENGTH, heads=2, dtype=dtype, **sizes)
    inputs["key"] = keys_of_topics(3, length=LENGTH).astype(dtype)
    return inputs


@functools.partial(jax.jit, static_argnames=("memory", "cases", "segmentation", "implementation"))
def run(inputs, memory, cases, segmentation=SEGMENTATION, ids=None, implementation=None):
    with scheduled("in_turn"):
        return {
            case: mc.memory_caching(
                **inputs,
                memory=memory,
                aggregation=AGGREGATIONS[case[0]],
                segmentation=segmentation,
                start=case[1],
                document_ids=ids,
                implementation=implementation,
            )
            for case in cases
        }


def test_borders_of_narrow_keys_are_those_of_streams(monkeypatch):
    """Sums in bfloat16 would end segments elsewhere: streams have float32."""
    found = []

    def spied(segmentation, key, document):
        found.append(key.dtype)
        return find_borders(segmentation, key, document)

    monkeypatch.setattr(one_pass, "find_borders", spied)
    memory = MEMORIES["linear"]
    inputs = topics(memory, jnp.bfloat16)
    how: Any = dict(memory=memory, aggregation=mc.GRM(), segmentation=SEGMENTATION)
    y = jax.eval_shape(lambda inputs: mc.memory_caching(**inputs, **how), inputs)
    assert y.dtype == jnp.bfloat16
    assert found == [jnp.float32]


def row_of(inputs, memory, row):
    tokens = over_time(inputs, memory, lambda x: x[row : row + 1])
    return tokens | {"weights": inputs["weights"]}


@pytest.mark.usefixtures("x64")
class TestEveryForm:
    """Rules of each form, in float64."""

    @pytest.mark.parametrize("rule", kept_of([*FAMILIES], "titans", fast=["linear"]))
    def test_outputs_are_those_of_the_same_segments_by_hand(self, rule):
        memory = MEMORIES[rule]
        inputs = topics(memory)
        got = run(inputs, memory, EACH)
        lengths = np.bincount(segments_of(inputs["key"][1]))
        lengths[-1] = -(-lengths[-1] // 4) * 4 + 16  # whole chunks
        by_hand = mc.Lengths(tuple(lengths.tolist()))
        wanted = run(row_of(inputs, memory, 1), memory, EACH, by_hand)
        assert_close({name: y[1:] for name, y in got.items()}, wanted, 1e-12)

    @pytest.mark.parametrize("rule", kept_of([*FAMILIES], "linear"))
    def test_reference_documents_and_gradients(self, rule):
        memory = MEMORIES[rule]
        inputs = topics(memory)
        fast, plain = (
            value_and_vjp(
                lambda inputs, how=how: run(inputs, memory, CASES, ids=IDS, implementation=how),
                inputs,
            )
            for how in (None, "reference")
        )
        assert_close(fast, plain, 1e-9)
        # A document that begins with a block has the outputs that it has alone.
        packed = fast[0]
        alone = over_time(row_of(inputs, memory, 0), memory, lambda x: x[:, 12:])
        alone = run(alone | {"weights": inputs["weights"]}, memory, CASES)
        assert_close({name: y[:1, 12:] for name, y in packed.items()}, alone, 1e-12)

    @pytest.mark.parametrize("rule", kept_of([*FAMILIES], "gated_deltanet"))
    def test_streams(self, rule):
        memory = MEMORIES[rule]
        inputs = topics(memory)
        wanted = run(inputs, memory, CASES)

        @jax.jit
        def streamed(inputs):
            outputs = {}
            for kind, start in CASES:
                cache = empty(inputs, memory, AGGREGATIONS[kind], SEGMENTATION, start)
                parts = []
                for begin, end in ((0, 19), (19, 20), (20, LENGTH)):
                    part = over_time(inputs, memory, lambda x, b=begin, e=end: x[:, b:e])
                    y, cache = mc.extend(cache, **part)
                    parts.append(y)
                outputs[kind, start] = jnp.concatenate(parts, axis=1)
            return outputs

        with scheduled("in_turn"):
            assert_close(streamed(inputs), wanted, 1e-12)

    def test_a_row_goes_back_over_a_border(self):
        memory = MEMORIES["gated_deltanet"]
        inputs = topics(memory)
        step = jax.jit(mc.extend)
        cache = empty(inputs, memory, mc.GRM(), SEGMENTATION, rewind=8)

        def take(cache, begin, end):
            return step(cache, **over_time(inputs, memory, lambda x: x[:, begin:end]))

        first, cache = take(cache, 0, 30)
        again, cache = take(cache.rewind(np.array([8, 3])), 22, 30)
        assert_close(again[0], first[0, 22:], 1e-12)


def test_what_comes_later_changes_nothing():
    memory = MEMORIES["linear"]
    inputs = topics(memory, np.float32)
    whole = run(inputs, memory, CASES)
    changed = over_time(inputs, memory, lambda x: np.concatenate([x[:, :30], -x[:, 30:]], axis=1))
    changed = run(changed | {"weights": {}}, memory, CASES)
    part = run(over_time(inputs, memory, lambda x: x[:, :30]) | {"weights": {}}, memory, CASES)
    for name in whole:
        np.testing.assert_allclose(changed[name][:, :30], whole[name][:, :30], atol=2e-6)
        np.testing.assert_allclose(part[name], whole[name][:, :30], atol=2e-6)
    # What is not finite reaches no earlier token, and no later segment unless that reads it.
    inputs["value"][0, 30, 0] = np.nan
    broken = run(inputs, memory, CASES)
    for name, y in broken.items():
        np.testing.assert_allclose(y[0, :30], whole[name][0, :30], atol=2e-6)
        np.testing.assert_allclose(y[1], whole[name][1], atol=2e-6)
        assert np.isnan(y[0, 30, 0]).all()


def test_meshes():
    memory = MEMORIES["linear"]
    inputs = topics(memory, np.float32)
    wanted = run(inputs, memory, CASES[:1])
    with jax.set_mesh(make_mesh(dict(data=2, tensor=2), devices=jax.devices()[:4])):
        assert_close(run(inputs, memory, CASES[:1]), wanted, 1e-6)
    with (
        jax.set_mesh(make_mesh(dict(seq=2), devices=jax.devices()[:2])),
        pytest.raises(ValueError, match=r"segments of one size, got Adaptive\(min=8"),
    ):
        run(inputs, memory, CASES[:1])


@pytest.mark.slow
def test_layers_decode_as_they_train():
    segmentation = mc.Adaptive(4, 8, 0.3, block=2)
    layer = mc.nn.MemoryCaching(
        *(8, 2),
        memory=mc.memories.GatedDeltaNet(),
        aggregation=mc.SSC(top_k=1),
        segmentation=segmentation,
        rngs=nnx.Rngs(0),
    )
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 23, 8)), jnp.float32)

    @nnx.jit
    def run(layer, x):
        cache, outputs = layer.init_cache(2, max_length=23), []
        for begin, end in ((0, 9), (9, 10), (10, 23)):
            y, cache = layer(x[:, begin:end], cache=cache)
            outputs.append(y)
        return jnp.concatenate(outputs, axis=1), layer(x), layer.gates(x)

    stream, one_pass, gates = map(np.asarray, run(layer, x))
    np.testing.assert_allclose(stream, one_pass, atol=1e-5)
    assert gates.shape == (2, 23, 2, segmentation.most_states(23) + 1)
    np.testing.assert_allclose(gates.sum(axis=-1), 1, atol=1e-5)


def test_refusals():
    how: Any = dict(memory=mc.memories.SSD(), aggregation=mc.GRM(), segmentation=mc.Adaptive(4, 8))
    with pytest.raises(ValueError, match="segments of one size, Constant, got Adaptive"):
        mc.init_cache(1, 1, 4, 4, **how, max_segments=2, policy="drop_oldest")
    with pytest.raises(ValueError, match="give max_segments or max_length"):
        mc.init_cache(1, 1, 4, 4, **how)
