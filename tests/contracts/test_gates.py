"""Every rule with every gate."""

import functools

import jax
import pytest

import memcache_jax as mc
from tests.cases import (
    COVER,
    FAMILIES,
    MEMORIES,
    SEGMENTATIONS,
    STARTS,
    Together,
    assert_close,
    make_inputs,
    scheduled,
)
from tests.covers import rules

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("x64")]
GATED = (("content", "mean"), ("content", "sum"), ("position", "mean"), ("uniform", "mean"))


@pytest.mark.parametrize("name", rules(4, among=COVER))
def test_every_rule_with_every_gate(name):
    """By the fast path as by the recurrence, the connector a vector of its own or the query.

    One rule of each family has both plans, of the others one half has each.
    """
    memory, shift = MEMORIES[name], list(MEMORIES).index(name)
    inputs = make_inputs(memory, 14, batch=1, heads=1)
    ssc = functools.partial(mc.SSC, top_k=2)
    kinds = mc.GRM, mc.Soup, ssc, functools.partial(ssc, inner="soup")

    @jax.jit
    def outputs(inputs):
        got, wanted = [], []
        plans = [*enumerate(zip(STARTS, SEGMENTATIONS.values(), strict=True))]
        for i, (start, segmentation) in plans if name in FAMILIES else plans[shift % 2 :][:1]:
            together = Together(
                tuple(
                    kinds[(shift + i + j) % 4](gate=gate, pooling=pooling)
                    for j, (gate, pooling) in enumerate(GATED)
                )
            )
            run = functools.partial(
                mc.memory_caching,
                **inputs,
                memory=memory,
                segmentation=segmentation(4),
                start=start,
            )
            got.append(run(aggregation=together))
            each = (run(aggregation=kind, implementation="reference") for kind in together.kinds)
            wanted.append(together.scaled(each))
        return got, wanted

    with scheduled("in_turn"):
        for connector in ("connector", "query"):
            got, wanted = outputs({**inputs, "connector": inputs[connector]})
            assert_close(got, wanted, 1e-12)
