"""Streams: any split of a sequence gives the outputs of one pass over the whole."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from tests.cases import (
    AGGREGATIONS,
    COVER,
    FAMILIES,
    KINDS,
    MEMORIES,
    SEGMENTATIONS,
    assert_close,
    each_once,
    kinds_of,
    make_inputs,
    run_all,
    scheduled,
    twice_each,
    value_and_vjp,
)
from tests.covers import kept_of, rules
from tests.streams import empty, over_time, whole
from tests.vectors import RULES, SEGMENT, assert_agrees, vector_inputs

LENGTH = 37


@functools.partial(jax.jit, static_argnames=("memory", "cases", "count"))
def streamed_all(inputs, memory, cases, count):
    """All cases in one program, in calls of ``count`` tokens; what is left at the end is not."""
    calls = inputs["key"].shape[1] // count
    tokens = over_time(inputs, memory, lambda x: x[:, : calls * count])
    outputs = {}
    for name, kind, segmentation, start in cases:

        def call(cache, begin):
            part = over_time(
                tokens, memory, lambda x: jax.lax.dynamic_slice_in_dim(x, begin, count, axis=1)
            )
            y, cache = mc.extend(cache, **part)
            return cache, y

        with scheduled("in_turn"):
            cache = empty(inputs, memory, kind, segmentation, start)
            _, y = jax.lax.scan(call, cache, count * jnp.arange(calls))
        outputs[name] = jnp.concatenate(list(y), axis=1)
    return outputs


def named(cases):
    """Cases of ``run_all`` for ``streamed_all``."""
    return tuple(
        ("/".join(case), KINDS[case[0]], SEGMENTATIONS[case[1]](SEGMENT), case[2]) for case in cases
    )


@pytest.mark.usefixtures("x64")
class TestEveryRule:
    """Streams of every rule, against tests/vectors.py where it has the outputs."""

    @pytest.mark.parametrize("rule", rules(3))
    def test_token_by_token(self, rule):
        """Every aggregation; of two forms of rules twice, with every segmentation and start."""
        cases = twice_each(0, KINDS) if rule in ("linear", "titans") else self.few(rule, 0)
        self.compare(rule, cases, count=1)

    @pytest.mark.parametrize("rule", rules(0, "linear", among=COVER))
    def test_in_pieces(self, rule):
        """Calls that end within segments and chunks, over borders of both."""
        self.compare(rule, self.few(rule, 2), count=7)

    def few(self, rule, shift):
        """Each aggregation once, with segmentations and starts that go round from rule to rule."""
        return each_once(shift + list(MEMORIES).index(rule), kinds_of(MEMORIES[rule]))

    def compare(self, rule, cases, count):
        if rule in RULES:
            memory, inputs = vector_inputs(rule)
        else:
            memory, inputs = MEMORIES[rule], make_inputs(MEMORIES[rule], 22, batch=1, heads=1)
        outputs = streamed_all(inputs, memory, named(cases), count)
        assert len(outputs) == len(cases)
        known = [c for c in cases if rule in RULES and (c[0] != "ssc_soup" or memory.depth == 1)]
        for case in known:
            name = "/".join(("ssc" if case[0] == "ssc_soup" else case[0], *case[1:]))
            assert_agrees(rule, name, outputs.pop("/".join(case)))
        if outputs:
            others = tuple(case for case in cases if case not in known)
            wanted = run_all(inputs, memory, cases=others)
            for name, y in outputs.items():
                assert_close(y, wanted[name][:, : y.shape[1]], 1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", kept_of(["linear", "titans"], "linear"))
def test_other_gates_and_segments(name):
    memory = MEMORIES[name]
    inputs = make_inputs(memory, 29, batch=1, heads=1)
    lengths = mc.Lengths((4, 12, 4, 4, 8))
    plans: tuple = (
        (mc.GRM(gate="position"), mc.Constant(4), "checkpoint"),
        (mc.SSC(gate="position", top_k=2), lengths, "independent"),
        (mc.GRM(gate="uniform"), lengths, "checkpoint"),
        (mc.Soup(gate="uniform"), mc.Logarithmic(4), "checkpoint"),
        (mc.GRM(pooling="sum"), mc.Logarithmic(4), "independent"),
        (mc.SSC(pooling="sum", top_k=2, inner="soup"), lengths, "checkpoint"),
        (mc.Soup(), lengths, "independent"),
        (mc.Residual(), lengths, "independent"),
    )
    # What is read does not depend on the rule; mixtures differ from reads where a rule is deep.
    plans = tuple(plan for plan in plans if name == "linear" or plan[0].mixes)
    cases = tuple((repr(plan), *plan) for plan in plans)
    got = streamed_all(inputs, memory, cases, 7)
    for name, *plan in cases:
        assert_close(got[name], whole(inputs, memory, *plan)[:, :28], 1e-10)


@pytest.mark.parametrize("kind", kept_of([*AGGREGATIONS], "ssc"))
def test_16384_tokens(kind):
    memory, segmentation, kind = MEMORIES["titans"], mc.Constant(512), AGGREGATIONS[kind]
    sizes: dict[str, Any] = dict(batch=1, heads=1, dim=8, dtype=jnp.float32)
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 1 << 14, **sizes))
    wanted = whole(inputs, memory, kind, segmentation)
    step = jax.jit(mc.extend, donate_argnums=0)
    cache, outputs = empty(inputs, memory, kind, segmentation), []
    for begin, end in itertools.pairwise([0, 5461, 2 * 5461, 3 * 5461, 1 << 14]):
        part = over_time(inputs, memory, lambda x, b=begin, e=end: x[:, b:e])
        y, cache = step(cache, **part)
        outputs.append(y)
    assert_close(jnp.concatenate(outputs, axis=1), wanted, 1e-4)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("memory", kept_of(FAMILIES, "titans"))
def test_rows_at_positions_of_their_own(memory):
    kind, segmentation = mc.GRM(), mc.Constant(8)
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, LENGTH, batch=3))
    wanted = np.asarray(whole(inputs, memory, kind, segmentation))
    step = jax.jit(mc.extend)
    cache = empty(inputs, memory, kind, segmentation)
    inputs = jax.tree.map(np.asarray, inputs)
    position = np.zeros(3, int)
    for lengths in ([5, 13, 1], [0, 13, 9], [11, 2, 13], [13, 9, 0]):
        there = position[:, None] + np.arange(13)[None]
        part = over_time(
            inputs,
            memory,
            lambda x, t=there: np.take_along_axis(
                x, np.minimum(t, LENGTH - 1).reshape(3, 13, *[1] * (x.ndim - 2)), axis=1
            ),
        )
        y, cache = step(cache, **part, lengths=np.asarray(lengths))
        for row, count in enumerate(lengths):
            known = wanted[row, position[row] : position[row] + count]
            assert_close(y[row, :count], known, 1e-10, scale=1.0)
            np.testing.assert_array_equal(y[row, count:], 0.0)
        position += lengths
        np.testing.assert_array_equal(cache.position, position)

    # One row anew, the others in another order.
    cache = cache.reset(np.array([False, True, False])).take(np.array([1, 0]))
    part = over_time(inputs, memory, lambda x: np.stack([x[1, :4], x[0, 29:33]]))
    y, _ = step(cache, **part)
    assert_close(y, np.stack([wanted[1, :4], wanted[0, 29:33]]), 1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", kept_of(["linear", "titans"], fast=["linear"]))
def test_gradients_pass_from_call_to_call(name):
    memory = MEMORIES[name]
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 21, batch=1, heads=1))

    plan: Any = (mc.GRM(), mc.Constant(8))

    def in_pieces(inputs):
        return streamed_all(inputs, memory, (("grm", *plan, "independent"),), 7)["grm"]

    with scheduled("in_turn"):
        got = value_and_vjp(in_pieces, inputs)
        wanted = value_and_vjp(lambda inputs: whole(inputs, memory, *plan), inputs)
    assert_close(got, wanted, 1e-9, scale=1.0)
