"""Every implementation of the grouped read against the reference, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.kernels import _table, _tpu
from memcache_jax.kernels._triton import lowered_for_gpu
from memcache_jax.kernels.grouped_read import _blocks, grouped_read, tpu
from tests.cases import SCHEDULES, assert_close, normals, scheduled, value_and_vjp
from tests.covers import first_kept, kept_of, product
from tests.kernels.interpreters import (
    KERNELS,
    all_parallel,
    compare_to_reference,
    finds_races,
    runnable,
)

MEMORIES = {
    "matrix": (mc.memories.LinearAttention(), [(4, 4)]),
    "deep": (mc.memories.Titans(expansion=3), [(4, 12), (12, 4)]),
}


def make(memory, states, dtype=jnp.float32, rows=29):
    """Rows that choose two of ``states`` states each, or fewer, and never the last of several."""
    memory, shapes = MEMORIES[memory]
    normal, lead, rows = normals(0, dtype), (2, 1), (2, 1, 3, rows)
    bank = tuple(normal(*lead, states, *shape) * shape[0] ** -0.5 for shape in shapes)
    query, gates = normal(*rows, 4), normal(*rows, 2)
    chosen = jnp.asarray(np.random.default_rng(1).integers(-1, max(states - 1, 1), gates.shape))
    for matrix in bank:
        matrix[:, :, 1:][:, :, -1:] = np.nan
    bank = tuple(map(jnp.asarray, bank))
    return memory, (bank, jnp.asarray(query), jnp.asarray(gates)), chosen


def compare(memory, arguments, chosen, tolerance, schedule="in_turn"):
    def outputs(implementation):
        return value_and_vjp(
            lambda bank, query, gates: grouped_read(
                memory.read, bank, query, gates, chosen, implementation=implementation
            ),
            *arguments,
        )

    with scheduled(schedule):
        got = outputs("xla")
    wanted = outputs("reference")
    assert_close(got[0], wanted[0], tolerance)
    assert_close(got[1], wanted[1], 2 * tolerance)


@pytest.mark.parametrize(
    ("memory", "precision", "schedule"), product([*MEMORIES], ["float64", "float32"], [*SCHEDULES])
)
def test_xla_equals_reference(memory, precision, schedule):
    tolerance = dict(float64=1e-12, float32=1e-6)[precision]
    with jax.enable_x64(precision == "float64"):
        compare(*make(memory, 7, jnp.dtype(precision)), tolerance, schedule)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("states", first_kept(1, [1, 40]))
def test_few_and_many_states(states):
    compare(*make("matrix", states, jnp.float64), 1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("memory", MEMORIES)
def test_one_row_of_a_block(memory):
    compare(*make(memory, 7, jnp.float64, rows=1), 1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_all_rows_may_choose_one_state_and_one_state_twice():
    memory, arguments, chosen = make("matrix", 5, jnp.float64)
    compare(memory, arguments, jnp.full_like(chosen, 3), 1e-12)


# Rows of a block, choices, states, heads, k, v, the memory, dtype.
CASES = {
    "matrix": (5, 2, 6, 2, 8, 12, "matrix", "float32"),
    "deep": (63, 3, 4, 1, 20, 20, "deep", "float32"),
    "one row": (1, 1, 3, 1, 96, 64, "matrix", "float32"),
    "one state": (100, 2, 1, 1, 4, 4, "deep", "float32"),
    "bfloat16": (5, 2, 4, 1, 16, 16, "matrix", "bfloat16"),
}


def make_case(rows, choices, states, heads, k, v, memory, dtype):
    shapes = [(k, v)] if memory == "matrix" else [(k, 3 * k), (3 * k, k)]
    normal, lead = normals(1, np.float32), (2, heads)
    bank = tuple(normal(*lead, states, *shape) * shape[0] ** -0.5 for shape in shapes)
    arrays = bank, normal(*lead, 3, rows, k), normal(*lead, 3, rows, choices)
    arrays[2][:, :, 1, 0] = 0.0  # a gate of zero has a gradient too
    # The last of several states is chosen by none.
    draw = np.random.default_rng(2).integers(-1, max(states - 1, 1), arrays[2].shape)
    for matrix in bank:
        matrix[:, :, 1:][:, :, -1:] = np.nan
    arrays = jax.tree.map(lambda x: jnp.asarray(x, dtype), arrays)
    read = MEMORIES[memory][0].read
    chosen = jnp.asarray(draw, jnp.int32)

    def operation(bank, query, gates, **options):
        return grouped_read(read, bank, query, gates, chosen, **options)

    return operation, arrays


@pytest.fixture
def sorted_rows(monkeypatch):
    """Makes TPU kernels sort rows by state even if there are few states."""
    monkeypatch.setattr(tpu, "_MOST_STATES", 0)


def compare_case(implementation, case):
    operation, arrays = make_case(*case)
    compare_to_reference(
        operation,
        implementation,
        *arrays,
        tolerance={"float32": 1e-6, "bfloat16": 1e-2}[case[-1]],
        wanted_dtype=jnp.float32,
    )


@pytest.mark.parametrize(("case", "implementation"), product(CASES, KERNELS, turn=1))
def test_kernels_equal_reference(implementation, case):
    compare_case(implementation, case)


@pytest.mark.usefixtures("sorted_rows")
@pytest.mark.parametrize("case", kept_of(CASES, "matrix", "bfloat16", fast=["matrix"]))
def test_tpu_kernels_of_sorted_rows_equal_reference(case):
    compare_case("pallas_tpu", case)


def test_which_tpu_kernels_sort():
    def kernel(k, states):
        rows, chosen = (1, 2, 1, 100), jnp.zeros((1, 2, 1, 100, 2), jnp.int32)
        shapes = (1, 2, states, k, k), (*rows, k), (*rows, 2)
        bank, *arrays = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        read = MEMORIES["matrix"][0].read
        with runnable("pallas_tpu"):
            program = jax.make_jaxpr(
                lambda bank, query, gates: grouped_read(
                    read, bank, query, gates, chosen, implementation="pallas_tpu"
                )
            )
            return "bank_read" if "bank_read" in str(program((bank,), *arrays)) else "grouped_read"

    # More states than 16 times the choices, and more than the memory holds.
    assert [kernel(8, 32), kernel(8, 33)] == ["bank_read", "grouped_read"]
    assert [kernel(512, 4), kernel(512, 32)] == ["bank_read", "grouped_read"]


@pytest.mark.slow
@pytest.mark.usefixtures("sorted_rows")
@pytest.mark.parametrize("implementation", KERNELS)
def test_several_blocks_of_a_state(monkeypatch, implementation):
    sizes = {**_table.TABLE[f"grouped_read/{implementation}"]["default"], "rows": 16}
    monkeypatch.setitem(_table.TABLE, f"grouped_read/{implementation}", {"default": sizes})
    compare_case(implementation, (29, 2, 4, 1, 4, 4, "matrix", "float32"))


@pytest.mark.usefixtures("sorted_rows")
@pytest.mark.slow
@pytest.mark.parametrize("implementation", KERNELS)
def test_a_wrong_state_is_seen(monkeypatch, implementation):
    def arrange(*args):
        blocks = _arrange(*args)
        return blocks._replace(state=jnp.maximum(blocks.state - 1, 0))

    _arrange = _blocks.arrange
    monkeypatch.setattr(_blocks, "arrange", arrange)
    with pytest.raises(AssertionError, match="> "):
        compare_case(implementation, CASES["matrix"])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("implementation", KERNELS)
def test_float32_where_integers_have_64_bits(implementation):
    compare_case(implementation, CASES["matrix"])


@pytest.mark.usefixtures("sorted_rows")
@pytest.mark.slow
def test_units_are_read_in_parts_where_scalar_memory_is_small(monkeypatch):
    case = CASES["matrix"]
    operation, arrays = make_case(*case)
    blocks = _blocks.most_blocks(3 * 5 * 2, 6, 16)

    def parts(room):
        monkeypatch.setattr(_tpu, "_SMEM", 4 * room)
        return tpu._parts(4, blocks)

    assert [parts(4 * blocks), parts(4 * blocks - 1), parts(blocks)] == [1, 2, 4]
    compare_case("pallas_tpu", case)
    monkeypatch.setattr(_tpu, "_SMEM", 4 * blocks - 1)
    with pytest.raises(NotImplementedError, match=f"scalar memory: lists of {blocks} numbers"):
        operation(*arrays, implementation="pallas_tpu")


@pytest.mark.usefixtures("sorted_rows")
@pytest.mark.slow
def test_no_two_cores_write_one_block(monkeypatch):
    operation, arrays = make_case(3, 2, 2, 1, 4, 4, "matrix", "float32")

    def run(*arrays):
        return value_and_vjp(lambda *xs: operation(*xs, implementation="pallas_tpu"), *arrays)

    assert not finds_races(run, *arrays)
    monkeypatch.setattr(tpu, "tpu_call", all_parallel(tpu.tpu_call))
    assert finds_races(run, *arrays)


@pytest.mark.parametrize("implementation", KERNELS)
def test_kernels_take_no_float64(implementation):
    with jax.enable_x64(True):
        memory, arguments, chosen = make("matrix", 3, jnp.float64)
        with pytest.raises(NotImplementedError, match="float64"):
            grouped_read(memory.read, *arguments, chosen, implementation=implementation)


@pytest.mark.slow
@pytest.mark.usefixtures("every_platform")
def test_triton_kernels_lower():
    operation, arrays = make_case(256, 4, 16, 1, 96, 96, "matrix", "bfloat16")
    function = jax.jit(
        lambda *xs: jax.vjp(lambda *xs: operation(*xs, implementation="pallas_gpu"), *xs)[1](xs[1])
    )
    text = lowered_for_gpu(function, *arrays).as_text()
    for kernel in ("backward_rows", "backward_bank"):
        assert f"grouped_read_{kernel}" in text


def test_unknown_implementation():
    memory, arguments, chosen = make("matrix", 3)
    with pytest.raises(ValueError, match="got 'cuda'"):
        grouped_read(memory.read, *arguments, chosen, implementation="cuda")
