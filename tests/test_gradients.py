"""Gradients of every rule, aggregation, segmentation and start."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from tests.cases import (
    AGGREGATIONS,
    KINDS,
    MEMORIES,
    PLANS,
    SEGMENTATIONS,
    Together,
    assert_close,
    make_inputs,
    normals,
    scheduled,
)


@functools.partial(jax.jit, static_argnames=("memory", "implementation"))
def loss_and_gradients(inputs, masks, memory, implementation):
    """Of the masked sum of all outputs."""

    def loss(inputs):
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
            for mask, (segmentation, start) in zip(masks, PLANS, strict=True)
        )

    with scheduled("in_turn"):
        return jax.value_and_grad(loss)(inputs)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
def test_gradients_equal_the_recurrences_and_differences(memory):
    inputs = make_inputs(memory, 14, batch=1, heads=1)
    normal = normals(9)
    masks = normal(len(PLANS), *inputs["value"].shape)
    value, gradients = loss_and_gradients(inputs, masks, memory, None)
    wanted_value, wanted = loss_and_gradients(inputs, masks, memory, "reference")
    assert_close(value, wanted_value, 1e-10)
    assert_close(gradients, wanted, 1e-8)

    # And along a random direction of each argument.
    arguments, tree = jax.tree.flatten(inputs)
    for i, (x, gradient) in enumerate(zip(arguments, jax.tree.leaves(gradients), strict=True)):
        direction = normal(*x.shape)

        def loss(distance, i=i, along=direction):
            moved = [x + distance * along if i == j else x for j, x in enumerate(arguments)]
            return float(
                loss_and_gradients(jax.tree.unflatten(tree, moved), masks, memory, None)[0]
            )

        # The second difference of first differences: the error is of fourth order.
        near, far = ((loss(h) - loss(-h)) / (2 * h) for h in (1e-4, 2e-4))
        difference = (4 * near - far) / 3
        assert abs(np.vdot(gradient, direction) - difference) <= 1e-8 * max(1, abs(difference))
