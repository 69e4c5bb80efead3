"""Documents packed into one sequence: each has the outputs that it has alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from tests.cases import (
    AGGREGATIONS,
    FAMILIES,
    MEMORIES,
    TWO_PLANS,
    assert_close,
    assert_slopes,
    make_inputs,
    normals,
    scheduled,
    value_and_vjp,
)
from tests.covers import first_kept, kept_of, product, rules

LENGTH, SEGMENT, BORDER = 37, 8, 24
# In the first row a document begins on a segment's border, after a chunk of 4 with parts of four
# documents; in both an id comes again.
IDS = np.array([[0] * 8 + [1] * 12 + [5, 5, 0, 7] + [4] * 13, [3] * 5 + [4] * 2 + [3] * 30])
SEGMENTATIONS = {
    "constant": mc.Constant(SEGMENT),
    "lengths": mc.Lengths((8, 16, 8, 8)),
    "logarithmic": mc.Logarithmic(4),
}


def traced(
    inputs,
    ids,
    memory,
    aggregation,
    segmentation=SEGMENTATIONS["constant"],
    start: Any = "independent",
    implementation=None,
):
    return mc.memory_caching(
        **inputs,
        memory=memory,
        aggregation=aggregation,
        segmentation=segmentation,
        start=start,
        document_ids=ids,
        implementation=implementation,
    )


packed = jax.jit(
    traced, static_argnames=("memory", "aggregation", "segmentation", "start", "implementation")
)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("memory", rules(3, "linear", values=True))
def test_every_rule_equals_its_recurrence(memory):
    inputs = make_inputs(memory, LENGTH)
    run = functools.partial(
        packed, inputs, IDS, memory, mc.SSC(top_k=2), SEGMENTATIONS["logarithmic"]
    )
    assert_close(run(), run(implementation="reference"), 1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("aggregation", "segmentation", "start"),
    first_kept(
        4,
        [
            ("residual", "logarithmic", "checkpoint"),
            ("grm", "lengths", "checkpoint"),
            ("soup", "constant", "checkpoint"),
            ("ssc", "lengths", "independent"),
            ("residual", "constant", "independent"),
            ("soup", "logarithmic", "independent"),
            ("ssc", "constant", "checkpoint"),
        ],
    ),
)
def test_every_aggregation_equals_the_recurrence(aggregation, segmentation, start):
    memory, kind = MEMORIES["titans"], AGGREGATIONS[aggregation]
    inputs = make_inputs(memory, LENGTH)
    run = functools.partial(packed, inputs, IDS, memory, kind, SEGMENTATIONS[segmentation], start)
    assert_close(run(), run("reference"), 1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "segmentation"),
    first_kept(
        2,
        [
            ("titans", "constant"),
            ("gated_deltanet", "logarithmic"),
            ("rwkv7", "constant"),
            ("swla", "logarithmic"),
        ],
    ),
)
def test_gradients_are_slopes_of_the_recurrence(name, segmentation):
    memory = MEMORIES[name]
    segmentation = SEGMENTATIONS[segmentation]
    inputs = make_inputs(memory, LENGTH, batch=2, heads=1)

    normal = normals(9)
    mask = normal(*inputs["value"].shape)

    @jax.jit
    @jax.value_and_grad
    def loss(inputs):
        return jnp.vdot(mask, packed(inputs, IDS, memory, mc.Soup(), segmentation))

    value, gradients = loss(inputs)
    recurrence = packed(inputs, IDS, memory, mc.Soup(), segmentation, implementation="reference")
    assert_close(value, jnp.vdot(mask, recurrence), 1e-10)
    assert_slopes(lambda x: loss(x)[0], inputs, gradients, normal, 1e-8, directions=3)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("memory", "plan"),
    product(FAMILIES, dict(carried_on=TWO_PLANS[0], logarithmic=TWO_PLANS[1]), turn=0),
)
def test_a_document_on_a_segment_border_is_as_if_alone(memory, plan):
    segmentation, start = SEGMENTATIONS[plan[0]], plan[1]
    inputs = make_inputs(memory, LENGTH)
    alone = jax.tree.map(lambda x: x[:, BORDER:], {**inputs, "weights": {}})
    alone["weights"] = inputs["weights"]
    y = packed(inputs, IDS, memory, mc.GRM(), segmentation, start)
    wanted = packed(alone, None, memory, mc.GRM(), segmentation, start)
    assert_close(y[:1, BORDER:], wanted[:1], 1e-12)


@pytest.mark.parametrize("name", kept_of(["linear", "deltanet"], "deltanet"))
def test_narrow_inputs_under_x64(name):
    inputs = make_inputs(MEMORIES[name], LENGTH, dtype=jnp.float32)
    wanted = packed(inputs, IDS, MEMORIES[name], mc.GRM())
    with jax.enable_x64(True):
        y = packed(inputs, IDS, MEMORIES[name], mc.GRM())
    assert y.dtype == jnp.float32
    assert_close(y, wanted, 1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_side_by_side():
    memory = MEMORIES["titans"]
    inputs = make_inputs(memory, 16, heads=1)
    ids = jnp.asarray(IDS[:, 12:28])

    def gradients(schedule):
        with scheduled(schedule):
            return value_and_vjp(lambda inputs: traced(inputs, ids, memory, mc.Soup()), inputs)

    assert_close(gradients("side_by_side"), gradients("in_turn"), 1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("gate", kept_of(["position", "uniform"], "position"))
def test_other_gates(gate):
    memory = MEMORIES["linear"]
    inputs = make_inputs(memory, LENGTH)
    run = functools.partial(packed, inputs, IDS, memory, mc.GRM(gate=gate, pooling="sum"))
    assert_close(run(), run(implementation="reference"), 1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_one_document_is_the_sequence():
    memory = MEMORIES["titans"]
    inputs = make_inputs(memory, LENGTH)
    ids = np.full((2, LENGTH), 3)
    wanted = packed(inputs, None, memory, mc.GRM())
    assert_close(packed(inputs, ids, memory, mc.GRM()), wanted, 1e-12)


@pytest.mark.parametrize("name", kept_of(["linear", "titans"], "titans"))
def test_a_document_on_a_segment_border_in_bfloat16(name):
    memory = MEMORIES[name]
    inputs = make_inputs(memory, LENGTH, batch=1, dtype=jnp.float32)
    inputs = jax.tree.map(lambda x: x.astype(jnp.bfloat16), inputs)
    alone = jax.tree.map(lambda x: x[:, BORDER:], {**inputs, "weights": {}})
    alone["weights"] = inputs["weights"]
    y = packed(inputs, IDS[:1], memory, mc.GRM())
    assert y.dtype == jnp.bfloat16
    wanted = packed(alone, None, memory, mc.GRM())
    assert_close(y[:, BORDER:], wanted, 1e-2)
