"""Blocks of affine memories: every implementation against chunks written in turn."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import memcache_jax as mc
from memcache_jax.engine.run import full_controls
from memcache_jax.engine.types import Rows, Writing
from memcache_jax.engine.write import initial_states, write_blocks
from memcache_jax.kernels import _sweep_plan
from memcache_jax.kernels._dispatch import interpret_kernels
from tests.cases import MEMORIES, assert_close, make_inputs, value_and_vjp
from tests.covers import exhaustive_unless, product

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
    ends, kept = write_blocks(how, rows_of(memory, *rows), restarts)
    return ends, kept["reads"]


def rows_of(memory, *rows):
    """Rows as a sequence is cut into them."""
    return Rows(*rows, came=Rows(*rows[:4]) if memory.on_chip else None)


def three_blocks(memory, implementation):
    """Ends, reads and gradients of blocks of one chunk; the second goes on from the first."""
    restarts = np.array([True, False, True])
    rows = make_rows(memory, 3, batch=1 if memory.on_chip else 2, heads=2 if memory.on_chip else 1)
    rows = jax.tree.map(lambda x: x[:, :, :, None], rows)

    def run(*rows):
        return written(memory, restarts, (*rows, None), implementation)

    return value_and_vjp(run, *rows)


@functools.cache
def in_turn(memory):
    return three_blocks(memory, "reference")


@pytest.mark.parametrize(
    ("memory", "implementation"),
    product(AFFINE, KERNELS, turn=0, fast=[("linear", "pallas_tpu")]),
)
def test_kernels_equal_chunks_in_turn(memory, implementation):
    with interpret_kernels():
        got = three_blocks(memory, implementation)
    wanted = in_turn(memory)
    assert_close(got[0], wanted[0], 1e-6)
    assert_close(got[1], wanted[1], 2e-6)


@pytest.mark.parametrize(
    ("implementation", "name"),
    product([*KERNELS, "xla"], ["swla", "gated_deltanet"], turn=0),
)
def test_documents(name, implementation):
    memory = AFFINE[name]
    rows = jax.tree.map(lambda x: x[:, :, :, None], make_rows(memory, 3))
    begun = jnp.zeros((2, 1, 3, 1, CHUNK)).at[0, :, 1, :, 4:].set(1).at[0, :, 2, :, :].set(1)
    restarts = np.array([True, True, True])
    with interpret_kernels():
        got = written(memory, restarts, (*rows, begun), implementation)
    assert_close(got, written(memory, restarts, (*rows, begun), "reference"), 1e-6)


def one_segment(rows, implementation, *, name="gated_deltanet", **options):
    """What a sequence of one segment reads, of two chunks and a part of one."""
    return mc.memory_caching(
        **rows,
        memory=AFFINE[name],
        aggregation=mc.Residual(),
        segmentation=mc.Constant(200),
        implementation=implementation,
        **options,
    )


def tokens(heads, keys, values, dtype, length=150, name="gated_deltanet"):
    inputs = make_inputs(AFFINE[name], length, batch=1, heads=heads, dim=keys, value_dim=values)
    kept = {name: inputs[name] for name in ("query", "key", "value", "controls")}
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), kept)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "heads", "keys", "values", "dtype", "tolerance"),
    [
        ("gated_deltanet", 3, 32, 24, jnp.bfloat16, 1e-2),
        pytest.param("gated_deltanet", 1, 96, 128, jnp.bfloat16, 1e-2, marks=pytest.mark.slow),
        pytest.param("gated_deltanet", 3, 128, 96, jnp.float32, 1e-5, marks=pytest.mark.slow),
        pytest.param("ssd", 3, 32, 24, jnp.bfloat16, 1e-2, marks=pytest.mark.slow),
        pytest.param("retnet", 3, 96, 40, jnp.float32, 1e-5, marks=exhaustive_unless(False)),
        pytest.param("gla", 3, 40, 24, jnp.bfloat16, 1e-2, marks=exhaustive_unless(False)),
        pytest.param("linear", 3, 32, 24, jnp.bfloat16, 1e-2, marks=exhaustive_unless(False)),
    ],
)
def test_tpu_kernels_make_maps_themselves(name, heads, keys, values, dtype, tolerance):
    rows = tokens(heads, keys, values, dtype, name=name)

    def read(rows, implementation):
        return one_segment(rows, implementation, name=name)

    with interpret_kernels():
        got = value_and_vjp(lambda rows: read(rows, "pallas_tpu"), rows)
    exact = jax.tree.map(lambda x: x.astype(jnp.float64), rows)
    wanted = value_and_vjp(lambda rows: read(rows, "reference"), exact)
    assert got[0].dtype == dtype
    assert_close(got[0], wanted[0], tolerance)
    assert_close(got[1], wanted[1], 2 * tolerance)


def test_blocks_of_some_heads(monkeypatch):
    rows = tokens(10, 8, 8, jnp.float32, 70)  # two blocks of five heads, one at a time

    def both(implementation):
        with interpret_kernels():
            return value_and_vjp(lambda rows: one_segment(rows, implementation), rows)

    monkeypatch.setattr(_sweep_plan, "_of_heads", lambda tree: [5])
    assert_close(both("pallas_tpu"), both("xla"), 1e-5)


def kernels_of(jaxpr):
    """The calls of kernels in a program, and in the programs that it calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
        else:
            for inner in jaxprs_in_params(equation.params):
                yield from kernels_of(inner)


def test_states_are_kept_in_float32():
    memory = AFFINE["gated_deltanet"]
    rows = jax.tree.map(lambda x: x[:, :, :, None], make_rows(memory, 2))
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), Rows(*rows))
    how = Writing(memory, ("reads",), initial_of(memory), "pallas_tpu")
    for restarts in np.array([[True, True], [True, False]]):
        (ends, _), kept = jax.eval_shape(
            lambda *rows, restarts=restarts: write_blocks(how, Rows(*rows, came=narrow), restarts),
            *rows,
        )
        assert ends.matrix.dtype == jnp.float32
        assert kept["reads"].dtype == jnp.bfloat16


def test_larger_states_take_maps_that_are_made_before():
    def operands(keys, values):
        rows = tokens(4, keys, values, jnp.bfloat16, 400)
        with interpret_kernels():
            program = jax.make_jaxpr(lambda rows: one_segment(rows, "pallas_tpu"))(rows)
        update = next(kernels_of(program.jaxpr))
        return {x.aval.dtype for x in update.invars[1:] if x.aval.shape[-1] >= keys}

    assert operands(128, 128) == {jnp.dtype("bfloat16")}  # tokens, of which kernels make the maps
    assert operands(256, 512) == {jnp.dtype("float32")}  # maps
    with pytest.raises(NotImplementedError, match="with maps made in the kernels: affine"):
        operands(2048, 2048)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_what_tpu_kernels_read_and_write(dtype):
    rows = tokens(2, 32, 24, dtype)

    def both(rows):
        y, pull = jax.vjp(lambda rows: one_segment(rows, "pallas_tpu"), rows)
        return pull(y)

    with interpret_kernels():
        calls = list(kernels_of(jax.make_jaxpr(both)(rows).jaxpr))
    padded, size = 2 * 192, jnp.dtype(dtype).itemsize  # tokens of both heads, in three chunks
    of_rows, outputs, states = padded * size * (2 * 32 + 24 + 2), padded * size * 24, 2 * 32 * 24
    spoilt = 4 * padded  # a number for each token, and its gradient
    # Rows, controls and what they read in their own dtype, and few states in float32: no maps.
    forward = of_rows + spoilt + outputs + 3 * 4 * states
    for call, wanted in zip(calls, (forward, forward + of_rows + spoilt), strict=True):
        passed = (*call.invars, *call.outvars)
        assert sum(x.aval.size * x.aval.dtype.itemsize for x in passed) == wanted
        text = str(call.params["jaxpr"])
        products, exact = text.count("dot_general["), text.count("Precision.HIGHEST") // 2
        assert products > exact if dtype == jnp.bfloat16 else products == exact


def test_tokens_reach_tpu_kernels_as_they_lie():
    """Neither copied nor cleaned before: nothing but reshapes and what XLA makes a view of."""
    rows = tokens(2, 32, 24, jnp.bfloat16)
    with interpret_kernels():
        program = jax.make_jaxpr(lambda rows: one_segment(rows, "pallas_tpu"))(rows)
    (call,) = kernels_of(program.jaxpr)
    shapes = [x.aval.shape for x in (*call.invars, *call.outvars)]
    assert shapes.count((1, 3, 64, 2, 32)) == 2
    assert shapes.count((1, 3, 64, 2, 24)) == 2
