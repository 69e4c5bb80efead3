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

    def spied(segmentation, key, document, **measures):
        found.append(key.dtype)
        return find_borders(segmentation, key, document, **measures)

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


OTHERS = {
    "errors": mc.Adaptive(8, 16, 0.1, block=4, by="errors"),
    "scores": mc.Adaptive(8, 16, block=4, by="scores"),
}
_ERRORS = [("errors", rule) for rule in FAMILIES]
_CASES = {f"{by}-{rule}": (by, rule) for by, rule in (*_ERRORS, ("scores", "linear"))}


@pytest.mark.parametrize(
    "case",
    kept_of(_CASES, "errors-titans", "errors-gated_deltanet", "scores-linear"),
)
@pytest.mark.usefixtures("x64")
def test_errors_and_scores_decide_alike_on_all_paths(case):
    """Streams split anywhere match one pass, even after going back across a border."""
    by, rule = case
    memory, segmentation, case = MEMORIES[rule], OTHERS[by], CASES[:1]
    inputs = with_scores(topics(memory), by)
    inputs["value"][1, 33, 0, 0] = np.nan  # a NaN error surprises no more
    wanted = run(inputs, memory, case, segmentation)[case[0]]

    @jax.jit
    def streamed(inputs):
        cache, parts = empty(inputs, memory, mc.GRM(), segmentation, rewind=4), []
        for begin, end, back in ((0, 19, 0), (19, 22, 3), (19, LENGTH, 0)):
            part = over_time(inputs, memory, lambda x, b=begin, e=end: x[:, b:e])
            y, cache = mc.extend(cache, **part)
            parts.append(y[:, : end - begin - back])
            cache = cache.rewind(np.full(2, back))
        return jnp.concatenate(parts, axis=1), cache.record.segments

    with scheduled("in_turn"):
        y, segments = streamed(inputs)
    np.testing.assert_allclose(y, wanted, atol=1e-12)
    assert segments.min() > 1
    part = over_time(inputs, memory, lambda x: x[:, :30]) | {"weights": inputs["weights"]}
    part = run(part, memory, case, segmentation)[case[0]]
    np.testing.assert_allclose(part, wanted[:, :30], atol=1e-12)


def with_scores(inputs, by="scores"):
    """The inputs, with logits of borders if ``by`` is "scores"."""
    if by == "scores":
        shape = inputs["key"].shape[:3]
        inputs["border"] = np.random.default_rng(0).standard_normal(shape)
    return inputs


@pytest.mark.usefixtures("x64")
class TestScores:
    """Segments by scores, and the gradients of the scores."""

    def test_outputs_and_gradients_are_those_of_the_reference(self):
        memory = MEMORIES["linear"]
        inputs = with_scores(topics(memory))
        how: Any = dict(segmentation=OTHERS["scores"], ids=IDS)
        cases = (("grm", "independent"),)
        fast, plain = (
            value_and_vjp(
                lambda inputs, plan=plan: run(inputs, memory, cases, implementation=plan, **how),
                inputs,
            )
            for plan in (None, "reference")
        )
        assert_close(fast, plain, 1e-9)

    def test_gradients_are_those_of_states_that_count_as_often_as_they_are_probable(self):
        """One row of a vector memory, whose states are values: the relaxation written out."""
        key, value = (
            jnp.asarray(np.random.default_rng(i).normal(size=(1, 16, 1, 3))) for i in (0, 1)
        )
        border = np.random.default_rng(2).standard_normal((1, 16, 1))
        border[:, 4:8] = 9  # a border after the second of four blocks
        border[:, [0, 1, 2, 3, 8, 9, 10, 11]] -= 9
        how: Any = dict(
            memory=mc.memories.Vector(),
            aggregation=mc.GRM(),
            segmentation=mc.Adaptive(4, 16, block=4, by="scores"),
        )

        def ours(border):
            return mc.memory_caching(key, key, value, key, border=border, **how)

        def relaxed(border):
            scores = border[0, :, 0].reshape(4, 4).mean(axis=1)
            k, v, rows = key[0, :, 0], value[0, :, 0], []
            for t in range(16):
                first = 0 if t < 8 else 8
                pooled, states, counts = [k[first : t + 1].mean(axis=0)], [v[t]], [jnp.zeros(())]
                for end in range(3):
                    if 4 * end + 3 < t:
                        begin, after = (0 if end < 2 else 8), 4 * end + 4
                        pooled.append(k[begin:after].mean(axis=0))
                        states.append(v[after - 1])
                        counts.append(jax.nn.log_sigmoid(scores[end]))
                gates = jax.nn.softmax(jnp.stack(pooled) @ k[t] + jnp.stack(counts))
                rows.append(gates @ jnp.stack(states))
            return jnp.stack(rows)[None, :, None]

        cotangent = jnp.asarray(np.random.default_rng(3).normal(size=(1, 16, 1, 3)))
        (y, got), (_, wanted) = (
            (y, pull(cotangent)[0])
            for y, pull in (jax.vjp(jax.jit(f), jnp.asarray(border)) for f in (ours, relaxed))
        )
        np.testing.assert_allclose(got, wanted, atol=1e-12)
        assert abs(got[:, :12]).min() > 0
        by_hand = mc.memory_caching(
            key, key, value, key, **how | dict(segmentation=mc.Lengths((8, 8)))
        )
        np.testing.assert_allclose(y, by_hand, atol=1e-12)


@pytest.mark.slow
def test_training_moves_borders_to_where_topics_end():
    """A topic's last block has a mark; gradient descent learns scores linear in the mark.

    In a topic values are a map of the keys, which a state learns if its segment is the topic.
    """
    sequences, tokens, asked, dim, random = 16, 96, 32, 8, np.random.default_rng(0)
    segmentation = mc.Adaptive(8, 32, block=4, by="scores")

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def keys_of(topic, count):
        around = random.standard_normal((count, dim))
        around -= (around @ topic)[:, None] * topic
        return (topic + unit(around)) / np.sqrt(2)

    query, key, value = np.zeros((3, sequences, tokens + asked, 1, dim), np.float32)
    mark = np.zeros((sequences, tokens + asked, 1), np.float32)
    for row in range(sequences):
        begin, topics = 0, []
        while begin < tokens:
            end = begin + int(random.choice([12, 16, 20, 24]))
            end = tokens if end > tokens - 12 else end
            topic = unit(random.standard_normal(dim))
            matrix = np.linalg.qr(random.standard_normal((dim, dim)))[0]
            key[row, begin:end, 0] = query[row, begin:end, 0] = keys_of(topic, end - begin)
            value[row, begin:end, 0] = key[row, begin:end, 0] @ matrix
            mark[row, end - 4 : end] = 1
            topics.append((topic, matrix))
            begin = end
        for place in range(tokens, tokens + asked):  # questions write nothing
            topic, matrix = topics[random.integers(len(topics))]
            query[row, place, 0] = keys_of(topic, 1)[0]
            value[row, place, 0] = query[row, place, 0] @ matrix
    writes = np.arange(tokens + asked)[None, :, None] < tokens
    arrays = dict(query=query, key=key, value=value * writes[..., None], connector=10 * query)
    beta = np.broadcast_to(writes, mark.shape).astype(np.float32)
    arrays = jax.tree.map(jnp.asarray, arrays | dict(controls=dict(beta=beta)))

    def loss(line, segmentation: Any = segmentation):
        how: Any = dict(memory=mc.memories.DeltaNet(), aggregation=mc.GRM())
        if isinstance(segmentation, mc.Adaptive):
            how["border"] = line[0] + line[1] * mark
        y = mc.memory_caching(**arrays, **how, segmentation=segmentation)
        return jnp.mean(jnp.sum((y - value)[:, tokens:] ** 2, axis=(-2, -1)))

    def ends(line):
        border = jnp.broadcast_to(line[0] + line[1] * mark, mark.shape)
        rows = jnp.moveaxis(arrays["key"], 2, 1)
        before = find_borders(segmentation, rows, None, border=jnp.moveaxis(border, 2, 1)).before
        return np.diff(np.asarray(before)[:, : tokens // 4 + 1], axis=1) > 0

    step: Any = jax.jit(jax.value_and_grad(loss))
    first: Any = jnp.array([-0.5, 0.0])
    line = first
    for _ in range(24):
        line -= step(line)[1]
    topics_end = mark[:, 3:tokens:4, 0] > 0
    assert ends(first).sum() < 0.6 * topics_end.sum()  # the longest segments
    np.testing.assert_array_equal(ends(line), topics_end)
    others = [first, jnp.array([0.5, 0.0])]  # the longest and the shortest segments
    losses = [float(step(other)[0]) for other in others]
    losses += [float(loss(line, mc.Constant(size))) for size in (8, 16)]
    assert step(line)[0] < 0.8 * min(losses)


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
@pytest.mark.parametrize("by", [pytest.param("keys", marks=pytest.mark.exhaustive), "scores"])
def test_layers_decode_as_they_train(by):
    segmentation = mc.Adaptive(4, 8, 0.3, block=2, by=by)
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

    assert hasattr(layer, "border") == (by == "scores")
    stream, one_pass, gates = map(np.asarray, run(layer, x))
    np.testing.assert_allclose(stream, one_pass, atol=1e-5)
    assert gates.shape == (2, 23, 2, segmentation.most_states(23) + 1)
    np.testing.assert_allclose(gates.sum(axis=-1), 1, atol=1e-5)


@pytest.mark.usefixtures("unchecked")
def test_refusals():
    how: Any = dict(memory=mc.memories.SSD(), aggregation=mc.GRM(), segmentation=mc.Adaptive(4, 8))
    with pytest.raises(ValueError, match="segments of one size, Constant, got Adaptive"):
        mc.init_cache(1, 1, 4, 4, **how, max_segments=2, policy="drop_oldest")
    with pytest.raises(ValueError, match="give max_segments or max_length"):
        mc.init_cache(1, 1, 4, 4, **how)
    rows = [jnp.ones((1, 9, 1, 4))] * 4
    how |= dict(memory=mc.memories.LinearAttention())
    with pytest.raises(ValueError, match=r"border is for Adaptive\(by='scores'\), got Adaptive"):
        mc.memory_caching(*rows, **how, border=jnp.ones((1, 9, 1)))
    how |= dict(segmentation=mc.Adaptive(4, 8, by="scores"))
    with pytest.raises(ValueError, match=r"pass border, logits \(b, t, h\) = \(1, 9, 1\)"):
        mc.memory_caching(*rows, **how)
    with pytest.raises(ValueError, match=r"border must have shape \(b, t, h\) = \(1, 9, 1\)"):
        mc.memory_caching(*rows, **how, border=jnp.ones((1, 9)))
    layer = mc.nn.MemoryCaching(4, 1, **how, rngs=nnx.Rngs(0))
    layer.segmentation = mc.Adaptive(4, 8, by="errors")
    with pytest.raises(ValueError, match="borders by errors depend on what memories recall"):
        layer.gates(jnp.ones((1, 9, 4)))
