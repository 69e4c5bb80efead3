"""Every implementation of the chunked update against the reference, forward and backward."""

import jax
import jax.numpy as jnp
import pytest

from memcache_jax.kernels.chunk_update import chunk_update
from tests.cases import (
    FAMILIES,
    SCHEDULES,
    assert_close,
    make_inputs,
    scheduled,
    value_and_vjp,
)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("memory", FAMILIES.values(), ids=FAMILIES)
def test_xla_equals_reference(memory, schedule):
    inputs = make_inputs(memory, 12, batch=2, heads=3)

    def heads_first(x):
        x = jnp.moveaxis(x, 2, 1)
        return x.reshape(*x.shape[:2], -1, memory.gradient_chunk or 4, *x.shape[3:])

    tokens = (inputs["query"], inputs["key"], inputs["value"], inputs["controls"])
    rows = jax.tree.map(heads_first, tokens)
    state = jax.vmap(lambda weights: memory.init(weights, 4, 4, jnp.float64), axis_size=3)(
        inputs["weights"]
    )
    state = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), state)

    def chunk(state, rows):
        query, key, value, controls = rows
        end, view = memory.write(state, state, key, value, controls)
        return end, memory.read_online(view, query)

    def outputs(implementation):
        return value_and_vjp(
            lambda s, r: chunk_update(chunk, s, r, batch_dims=2, implementation=implementation),
            state,
            rows,
        )

    with scheduled(schedule):
        got = outputs("xla")
    wanted = outputs("reference")
    assert_close(got[0], wanted[0], 1e-12)
    assert_close(got[1], wanted[1], 1e-10, scale=1.0)


def test_unknown_implementation():
    with pytest.raises(ValueError, match="got 'cuda'"):
        chunk_update(lambda s, r: (s, r), 0.0, 0.0, batch_dims=0, implementation="cuda")
