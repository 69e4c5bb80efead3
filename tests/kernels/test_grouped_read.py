"""Every implementation of the grouped read against the reference, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.kernels.grouped_read import grouped_read
from tests.cases import SCHEDULES, assert_close, normals, scheduled, value_and_vjp

MEMORIES = {
    "matrix": (mc.memories.LinearAttention(), [(4, 4)]),
    "deep": (mc.memories.Titans(expansion=3), [(4, 12), (12, 4)]),
}


def make(memory, states, dtype=jnp.float32, rows=29):
    """Rows that choose two of ``states`` states each."""
    memory, shapes = MEMORIES[memory]
    normal, lead, rows = normals(0, dtype), (2, 1), (2, 1, 3, rows)
    bank = tuple(normal(*lead, states, *shape) * shape[0] ** -0.5 for shape in shapes)
    query, gates = normal(*rows, 4), normal(*rows, 2)
    chosen = jnp.asarray(np.random.default_rng(1).integers(0, states, gates.shape))
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


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("precision", "tolerance"), [("float64", 1e-12), ("float32", 1e-6)])
@pytest.mark.parametrize("memory", MEMORIES)
def test_xla_equals_reference(memory, precision, tolerance, schedule):
    with jax.enable_x64(precision == "float64"):
        compare(*make(memory, 7, jnp.dtype(precision)), tolerance, schedule)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("states", [1, 40])
def test_few_and_many_states(states):
    compare(*make("matrix", states, jnp.float64), 1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("memory", MEMORIES)
def test_one_row_of_a_block(memory):
    compare(*make(memory, 7, jnp.float64, rows=1), 1e-12)


@pytest.mark.usefixtures("x64")
def test_all_rows_may_choose_one_state_and_one_state_twice():
    memory, arguments, chosen = make("matrix", 5, jnp.float64)
    compare(memory, arguments, jnp.full_like(chosen, 3), 1e-12)


def test_unknown_implementation():
    memory, arguments, chosen = make("matrix", 3)
    with pytest.raises(ValueError, match="got 'cuda'"):
        grouped_read(memory.read, *arguments, chosen, implementation="cuda")
