"""Every implementation of the bank read against the reference, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.kernels.bank_read import bank_read
from tests.cases import SCHEDULES, assert_close, normals, scheduled, value_and_vjp

RAGGED = np.array([[-1, -1, -1], [2, -1, 0], [-1, -1, -1], [1, 1, 2], [0, -1, -1]])
READS = {
    "constant": mc.Constant(4).plan(4 * 6).reads,
    "two blocks": mc.Constant(4).plan(8).reads,
    "one block": mc.Constant(4).plan(4).reads,
    "ragged": RAGGED,
    "each row its own": jnp.stack([RAGGED, RAGGED[::-1]]),
}
MEMORIES = {
    "matrix": (mc.memories.LinearAttention(), [(4, 4)]),
    "deep": (mc.memories.Titans(expansion=3), [(4, 12), (12, 4)]),
}


def make(memory, reads, dtype):
    memory, shapes = MEMORIES[memory]
    normal, (blocks, slots), lead = normals(0, dtype), reads.shape[-2:], (2, 3)
    states = max(slots, 1)
    bank = tuple(normal(*lead, states, *shape) * shape[0] ** -0.5 for shape in shapes)
    query, gates = normal(*lead, blocks, 5, 4), normal(*lead, blocks, 5, slots)
    bank = tuple(map(jnp.asarray, bank))
    return memory, (bank, jnp.asarray(query), jnp.asarray(gates))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("reads", READS.values(), ids=READS)
@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_xla_equals_reference(memory, reads, precision, schedule):
    with jax.enable_x64(precision == "float64"):
        tolerance = 1e-12 if precision == "float64" else 1e-6
        memory, arguments = make(memory, reads, jnp.dtype(precision))

        def outputs(implementation):
            return value_and_vjp(
                lambda bank, query, gates: bank_read(
                    memory.read, bank, query, gates, reads, implementation=implementation
                ),
                *arguments,
            )

        with scheduled(schedule):
            y, gradients = outputs("xla")
        y_wanted, gradients_wanted = outputs("reference")
        assert_close(y, y_wanted, tolerance)
        assert_close(gradients, gradients_wanted, 2 * tolerance)


def test_empty_slots_are_not_read():
    memory, (bank, query, gates) = make("deep", READS["ragged"], jnp.float32)
    poisoned = jnp.where(READS["ragged"][:, None] < 0, jnp.nan, gates)
    y = bank_read(memory.read, bank, query, poisoned, READS["ragged"])
    assert_close(y, bank_read(memory.read, bank, query, gates, READS["ragged"]), 0.0)
    np.testing.assert_array_equal(y[:, :, 0], 0.0)


def test_work_grows_with_the_pairs_that_are_read():
    from experiments._flops import count_flops

    def flops(blocks):
        memory, arguments = make("matrix", mc.Constant(4).plan(4 * blocks).reads, jnp.float32)
        reads = mc.Constant(4).plan(4 * blocks).reads
        return count_flops(lambda b, q, g: bank_read(memory.read, b, q, g, reads), *arguments)

    one_pair = flops(2) / 2  # one group of two: one real pair, one to fill up
    assert flops(9) == 36 * one_pair  # 9 x 8 / 2 pairs
    assert flops(17) == 136 * one_pair


def test_unknown_implementation():
    memory, arguments = make("matrix", READS["constant"], jnp.float32)
    with pytest.raises(ValueError, match="got 'cuda'"):
        bank_read(memory.read, *arguments, READS["constant"], implementation="cuda")
