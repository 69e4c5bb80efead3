"""Gradients of every rule, aggregation, segmentation and start."""

import dataclasses
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
    KINDS,
    MEMORIES,
    PLANS,
    SEGMENTATIONS,
    Together,
    assert_close,
    assert_slopes,
    kinds_of,
    make_inputs,
    normals,
)
from tests.covers import kept_of, rules

pytestmark = pytest.mark.slow


def loss(inputs, masks, memory, plans, implementation=None):
    """The masked sum of all outputs."""
    kinds = AGGREGATIONS if memory.depth == 1 else KINDS
    return sum(
        jnp.vdot(
            mask,
            mc.memory_caching(
                **inputs,
                memory=memory,
                aggregation=Together(tuple(kinds.values())),
                segmentation=SEGMENTATIONS[segmentation](4),
                start=start,
                implementation=implementation,
            ),
        )
        for mask, (segmentation, start) in zip(masks, plans, strict=True)
    )


def plans_of(name):
    """All for one rule of each form; for each other one every segmentation and every start."""
    if name in (*FAMILIES, "vector", "erasing"):
        return PLANS
    return PLANS[::3] if list(MEMORIES).index(name) % 2 else PLANS[1:3]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", rules(3))
def test_losses_equal_the_recurrences_and_gradients_are_slopes(name):
    memory, plans, normal = MEMORIES[name], plans_of(name), normals(9)
    inputs = make_inputs(memory, 14, batch=1, heads=1)
    how: Any = dict(masks=normal(len(plans), *inputs["value"].shape), memory=memory, plans=plans)
    both = jax.jit(jax.value_and_grad(functools.partial(loss, **how)))
    value, gradients = both(inputs)
    wanted = jax.jit(functools.partial(loss, **how, implementation="reference"))(inputs)
    assert_close(value, wanted, 1e-10)
    assert_slopes(lambda x: both(x)[0], inputs, gradients, normal, 1e-8, directions=3)


PRECISIONS = ((jnp.float32, 1e-6), (jnp.bfloat16, 1e-2))


@dataclasses.dataclass(frozen=True)
class InParts(Together):
    """Several aggregations over one writing of a memory, each of a part of the channels."""

    def scaled(self, outputs) -> Any:
        outputs = list(outputs)
        parts = (jnp.split(y, len(outputs), axis=-1)[i] for i, y in enumerate(outputs))
        return jnp.concatenate(list(parts), axis=-1)


def narrow_kinds(memory):
    """All kinds for one rule of each form; gates and a router see no more of the others."""
    kinds, some = kinds_of(memory), ("grm", "ssc")
    few = memory not in (*FAMILIES.values(), MEMORIES["vector"])
    return {name: kinds[name] for name in some} if few else kinds


def dim_of(memory):
    """About 15, with an equal part of the channels for each kind."""
    return 15 - 15 % len(narrow_kinds(memory))


@functools.partial(jax.jit, static_argnames=("memory", "size"))
def outputs_and_gradients(inputs, cotangents, *, memory, size):
    """Of each kind of aggregation."""
    kinds = narrow_kinds(memory)

    def outputs(inputs):
        y = mc.memory_caching(
            **inputs,
            memory=memory,
            aggregation=InParts(tuple(kinds.values())),
            segmentation=mc.Constant(size),
        )
        return jnp.stack(jnp.split(y, len(kinds), axis=-1))

    y, pull = jax.vjp(outputs, inputs)
    (gradients,) = jax.vmap(pull)(cotangents)
    return {
        name: (y[i], jax.tree.map(lambda x, i=i: x[i], gradients)) for i, name in enumerate(kinds)
    }


def assert_stays_close(inputs, **how):
    """Outputs and gradients in lower precision beside those of the same numbers in float64."""
    *rows, dim = inputs["value"].shape
    n = len(narrow_kinds(how["memory"]))
    cotangent = np.cos(np.arange(inputs["value"].size // n, dtype=np.float32))
    eye = np.eye(n, dtype=np.float32).reshape(n, n, *[1] * 4)
    cotangents = eye * cotangent.reshape(*rows, dim // n)
    for dtype, tolerance in PRECISIONS:
        narrow = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), (inputs, cotangents))
        results = outputs_and_gradients(*narrow, **how)
        with jax.enable_x64(True):
            exact = jax.tree.map(lambda x: x.astype(np.float64), narrow)
            wanted = outputs_and_gradients(*exact, **how)
        for name, (y, gradients) in results.items():
            assert y.dtype == dtype
            assert_close({name: y}, {name: wanted[name][0]}, tolerance)
            assert_close({name: gradients}, {name: wanted[name][1]}, 2 * tolerance)


# Linear attention, RetNet, SSD, DeltaNet and the rule of the docs are special cases of these.
LONG = ("swla", "gla", "gated_deltanet", "titans")


@pytest.mark.parametrize(
    "name", rules(2, among=["rwkv7", "kda", "gdn2", "dla", "titans_depth1", "vector"])
)
def test_lower_precision_stays_close(name):
    memory = MEMORIES[name]
    inputs = make_inputs(memory, 200, dim=dim_of(memory), dtype=jnp.float32)
    if name == "dla":
        # So that reads are not all but the query itself, and gates without a say.
        inputs["controls"]["eta"] *= 3
    assert_stays_close(inputs, memory=memory, size=64)


@pytest.mark.parametrize("name", kept_of(LONG, "gated_deltanet"))
def test_lower_precision_stays_close_over_long_sequences(name):
    memory = MEMORIES[name]
    length, dim = 4096 if memory.depth == 1 else 2048, dim_of(memory)
    inputs = make_inputs(memory, length, batch=1, heads=1, dim=dim, dtype=jnp.float32)
    if memory.gradient_chunk:  # longer steps diverge
        inputs["controls"]["eta"] *= 0.02
    # Near one number: of exactly one, the same rounding in each chunk would add up.
    near = np.random.default_rng(0).uniform(0.9, 1.1, inputs["controls"]["log_alpha"].shape)
    for alpha in (0.999, 0.8):
        inputs["controls"]["log_alpha"][:] = near * np.log(alpha)
        assert_stays_close(inputs, memory=memory, size=256)
