"""Blocks of affine memories: every implementation against chunks written in turn."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memcache_jax.engine.run import full_controls
from memcache_jax.engine.types import Rows, Writing
from memcache_jax.engine.write import initial_states, write_blocks
from memcache_jax.kernels._dispatch import interpret_kernels
from tests.cases import MEMORIES, assert_close, make_inputs, value_and_vjp, with_slow

KERNELS = ("pallas_tpu", "pallas_gpu")
AFFINE = {name: memory for name, memory in MEMORIES.items() if memory.form == "affine"}
CHUNK = 8


def make_rows(memory, chunks, *, batch=2, heads=1):
    """Rows (b, h, chunks, m, ...) with k = 4 and v = 6, some of them hard to get right."""
    shape: Any = dict(batch=batch, heads=heads, value_dim=6)
    inputs = make_inputs(memory, chunks * CHUNK, **shape, dtype=np.float32)
    given = (inputs[name] for name in ("controls", "key", "value"))
    controls = full_controls(memory, *jax.tree.map(jnp.asarray, tuple(given)))
    key, controls = inputs["key"].copy(), {name: np.array(x) for name, x in controls.items()}
    key[:, 3] = 0.0
    for name, x in controls.items():
        if name.startswith("log"):
            x[:, 5], x[0, CHUNK + 2] = -20.0, -np.inf
        if name == "beta":
            x[:, 6] = 0.0

    def heads_first(x):
        x = jnp.moveaxis(x, 2, 1)
        return x.reshape(*x.shape[:2], chunks, CHUNK, *x.shape[3:])

    return jax.tree.map(heads_first, (inputs["query"], key, inputs["value"], controls))


def initial_of(memory):
    return lambda shape: initial_states(memory, {}, shape, 4, 6, jnp.float32)


def written(memory, restarts, rows, implementation):
    """Ends and online reads of the blocks (b, h, n, chunks, m, ...)."""
    how = Writing(memory, ("reads",), initial_of(memory), implementation)
    ends, kept = write_blocks(how, Rows(*rows), restarts)
    return ends, kept["reads"]


def three_blocks(memory, implementation):
    """Ends, reads and gradients of blocks of one chunk; the second goes on from the first."""
    restarts = np.array([True, False, True])
    rows = jax.tree.map(lambda x: x[:, :, :, None], make_rows(memory, 3))

    def run(*rows):
        return written(memory, restarts, (*rows, None), implementation)

    return value_and_vjp(run, *rows)


@functools.cache
def in_turn(memory):
    return three_blocks(memory, "reference")


@pytest.mark.parametrize("implementation", with_slow(KERNELS, "pallas_tpu"))
@pytest.mark.parametrize("memory", with_slow(AFFINE, "linear"))
def test_kernels_equal_chunks_in_turn(memory, implementation):
    with interpret_kernels():
        got = three_blocks(memory, implementation)
    wanted = in_turn(memory)
    assert_close(got[0], wanted[0], 1e-6)
    assert_close(got[1], wanted[1], 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", [*KERNELS, "xla"])
@pytest.mark.parametrize("name", ["swla", "gated_deltanet"])
def test_documents(name, implementation):
    memory = AFFINE[name]
    rows = jax.tree.map(lambda x: x[:, :, :, None], make_rows(memory, 3))
    begun = jnp.zeros((2, 1, 3, 1, CHUNK)).at[0, :, 1, :, 4:].set(1).at[0, :, 2, :, :].set(1)
    restarts = np.array([True, True, True])
    with interpret_kernels():
        got = written(memory, restarts, (*rows, begun), implementation)
    assert_close(got, written(memory, restarts, (*rows, begun), "reference"), 1e-6)
