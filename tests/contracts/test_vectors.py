"""Every rule, aggregation, segmentation and start against outputs by other code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cases import (
    AGGREGATIONS,
    FAMILIES,
    MEMORIES,
    PLANS,
    REFERENCE,
    assert_close,
    combine,
    each_once,
    kinds_of,
    make_inputs,
    run_all,
    twice_each,
)
from tests.covers import rules
from tests.vectors import RULES, assert_agrees, vector_inputs


@pytest.mark.usefixtures("x64")
class TestVectors:
    """Outputs of every rule and combination against tests/vectors.py, to 1e-10."""

    @pytest.mark.slow
    @pytest.mark.parametrize("rule", RULES)
    def test_agrees_and_sees_no_later_token(self, rule):
        memory, inputs = vector_inputs(rule)
        kinds = [kind for kind in AGGREGATIONS if rule in FAMILIES or kind in kinds_of(memory)]
        shift = list(RULES).index(rule)
        cases = combine(kinds) if rule in FAMILIES else twice_each(shift, kinds)
        outputs = run_all(inputs, memory, cases=cases)
        assert len(outputs) == len(cases) >= 6
        for name, y in outputs.items():
            assert y.dtype == jnp.float64
            assert_agrees(rule, name, y)
        sees_no_later_token(memory, inputs, outputs, cases)
        for plan in PLANS if rule in FAMILIES else ():
            soup, grm = (outputs["/".join((kind, *plan))] for kind in ("soup", "grm"))
            first = 22 if memory.depth == 1 else 4
            assert_close(soup[:, :first], grm[:, :first], 1e-12)
            assert first == 22 or np.abs(soup[:, first:] - grm[:, first:]).max() > 1e-3

    @pytest.mark.parametrize("rule", rules(2, "linear", among=RULES))
    def test_a_prefix_agrees(self, rule):
        memory, inputs = vector_inputs(rule)
        shift = list(RULES).index(rule)
        for length, cases in (13, each_once(shift)), (1, each_once(shift + 2)[:1]):
            prefix = over_time(lambda x, t=length: x[:, :t], inputs, memory)
            for name, y in run_all(prefix, memory, cases=cases).items():
                assert_agrees(rule, name, y)

    @pytest.mark.parametrize("rule", rules(4, among=RULES))
    def test_reference_agrees(self, rule):
        memory, inputs = vector_inputs(rule)
        cases = combine(["ssc" if memory.depth == 1 else "soup"])
        for name, y in run_all(inputs, memory, cases=cases, options=REFERENCE).items():
            assert_agrees(rule, name, y)


def sees_no_later_token(memory, inputs, outputs, cases):
    """Other tokens after one change all outputs after it, and none before."""
    for t in (3, 9):
        changed = over_time(lambda x, t=t: changed_after(x, t), inputs, memory)
        for name, y in run_all(changed, memory, cases=cases).items():
            np.testing.assert_array_equal(y[:, : t + 1], outputs[name][:, : t + 1], name)
            assert not np.allclose(y[:, t + 1], outputs[name][:, t + 1]), name


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("shift", "name"), [*enumerate(sorted(MEMORIES.keys() - RULES.keys()))])
def test_others_agree_with_the_reference_and_see_no_later_token(shift, name):
    """Rules of which there are no outputs by other code."""
    memory = MEMORIES[name]
    inputs = make_inputs(memory, 22, batch=1, heads=1)
    cases = twice_each(shift, kinds_of(memory))
    outputs = run_all(inputs, memory, cases=cases)
    for name, y in run_all(inputs, memory, cases=cases[::2], options=REFERENCE).items():
        assert_close(outputs[name], y, 1e-12)
    sees_no_later_token(memory, inputs, outputs, cases)
    for length, some in (13, cases[1::2]), (1, cases[:1]):
        prefix = over_time(lambda x, t=length: x[:, :t], inputs, memory)
        for name, y in run_all(prefix, memory, cases=some).items():
            assert_close(y, outputs[name][:, :length], 1e-12)


def over_time(change, inputs, memory):
    """Inputs whose arrays over time are changed."""
    fixed = {name for name, control in memory.controls.items() if control.axes == "h"}

    def leaf(path, x):
        return x if path[0].key == "weights" or path[-1].key in fixed else change(x)

    return jax.tree_util.tree_map_with_path(leaf, inputs)


def changed_after(x, t):
    """The same up to token t; later tokens in reverse order."""
    return np.concatenate([x[:, : t + 1], x[:, :t:-1]], axis=1)
