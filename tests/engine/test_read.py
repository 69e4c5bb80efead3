"""Reads: how states are divided for kernels, and which implementation serves later layers."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.engine import read
from memcache_jax.engine.read import bands_of
from memcache_jax.kernels._dispatch import interpret_kernels
from memcache_jax.kernels.chunk_update import chunk_update
from tests.cases import MEMORIES, assert_close, make_inputs, value_and_vjp
from tests.engine.test_affine import kernels_of


def test_a_read_of_ones_own_is_not_divided():
    class Normalized(mc.memories.LinearAttention):
        def read(self, matrices, query, gate=None):
            y = super().read(matrices, query, gate)
            return y / jnp.linalg.norm(y, axis=-1, keepdims=True)

    divide = bands_of(Normalized())
    bands = divide((jnp.ones((4, 4)),), jnp.ones((2, 4)), lambda shapes: False)
    assert len(bands) == 1


@pytest.mark.slow
def test_the_later_layers_of_soups_are_read_by_the_implementation(monkeypatch):
    asked = []

    def update(*args, implementation=None, **options):
        asked.append(implementation)
        return chunk_update(*args, implementation=implementation, **options)

    monkeypatch.setattr(read, "chunk_update", update)
    inputs = make_inputs(MEMORIES["titans"], 12, batch=1, heads=1, dtype=np.float32)
    inputs = jax.tree.map(jnp.asarray, inputs)
    tokens = [inputs[name] for name in ("query", "key", "value", "query")]
    how = dict(memory=MEMORIES["titans"], aggregation=mc.Soup(), segmentation=mc.Constant(4))
    how |= {name: inputs[name] for name in ("controls", "weights")}

    def outputs(implementation):
        def run(*tokens):
            return mc.memory_caching(*tokens, **how, implementation=implementation)

        return value_and_vjp(run, *tokens)

    with interpret_kernels():
        got = outputs("pallas_tpu")
    assert asked == ["pallas_tpu"]
    wanted = outputs("reference")
    assert_close(got[0], wanted[0], 1e-6)
    assert_close(got[1], wanted[1], 2e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("aggregation", "dtype", "tolerance"),
    [(mc.GRM(), jnp.bfloat16, 1e-2), (mc.SSC(top_k=1), jnp.float32, 1e-5)],
    ids=["grm", "ssc"],
)
def test_tpu_kernels_read_states_with_tokens_as_they_come(aggregation, dtype, tolerance):
    memory = mc.memories.SSD()
    inputs = make_inputs(memory, 50, batch=2, heads=3, dim=8, dtype=np.float32)
    inputs = jax.tree.map(lambda x: jnp.asarray(x, dtype), inputs)

    def outputs(inputs, implementation):
        how = dict(memory=memory, aggregation=aggregation, segmentation=mc.Constant(16))
        run = functools.partial(mc.memory_caching, **how, implementation=implementation)
        return value_and_vjp(lambda inputs: run(**inputs), inputs)

    with interpret_kernels():
        got = outputs(inputs, "pallas_tpu")
        program = jax.make_jaxpr(lambda xs: outputs(xs, "pallas_tpu"))(inputs)
    wanted = outputs(jax.tree.map(lambda x: x.astype(jnp.float64), inputs), "reference")
    assert_close(got[0], wanted[0], tolerance)
    assert_close(got[1], wanted[1], 2 * tolerance)
    of_tokens = []
    for call in kernels_of(program.jaxpr):
        name, arrays = str(call.params["name"]), (x.aval for x in (*call.invars, *call.outvars))
        shaped = (x for x in arrays if x.shape == (2, 4, 16, 3, 8))
        of_tokens += [(name.split("_")[0], x.dtype) for x in shaped]
    wanted = {("bank", jnp.dtype(dtype)): 7}  # q, y; q, dy, dq; q, dy
    if type(aggregation) is mc.GRM:
        wanted["relevance", jnp.dtype(dtype)] = 6  # u, k; u, k, du, dk
    counts = collections.Counter(of_tokens)
    assert {of: n for of, n in counts.items() if of[0] in ("bank", "relevance")} == wanted
