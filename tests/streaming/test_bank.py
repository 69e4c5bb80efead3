"""The bank of a cache's slots: which of them a step reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.streaming.bank import SlotBank
from tests.cases import KINDS, MEMORIES, assert_close, make_inputs
from tests.streams import empty, over_time, whole


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("kind", "plan"),
    [
        ("grm", mc.Constant(4)),
        pytest.param("soup", mc.Constant(4), marks=pytest.mark.slow),
        pytest.param("grm", mc.Adaptive(min=4, max=8), marks=pytest.mark.slow),
        pytest.param("residual", mc.Logarithmic(4), marks=pytest.mark.slow),
    ],
)
def test_slots_are_read_once_a_row_has_a_state(monkeypatch, kind, plan):
    """And the outputs are those of one pass."""
    reads, every = [], SlotBank._all

    def counted(bank):
        jax.debug.callback(lambda: reads.append(1))
        return every(bank)

    monkeypatch.setattr(SlotBank, "_all", counted)
    memory, kind = MEMORIES["titans"], KINDS[kind]
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 12, heads=1))
    step, outputs, read = jax.jit(mc.extend), [], []
    cache = empty(inputs, memory, kind, plan, segments=3)
    for t in range(12):
        y, cache = step(cache, **over_time(inputs, memory, lambda x, t=t: x[:, t : t + 1]))
        jax.effects_barrier()
        outputs.append(y)
        read.append(bool(reads))
        reads.clear()
    first = read.index(True)
    assert first == 4 or isinstance(plan, mc.Adaptive)
    assert read == [False] * first + [True] * (12 - first)
    assert_close(jnp.concatenate(outputs, 1), whole(inputs, memory, kind, plan), 1e-12)


def test_a_row_without_states_does_not_see_those_of_others():
    """To the last bit: it reads no slots alone, and all of them beside another row."""
    memory, kind, plan = MEMORIES["gated_deltanet"], mc.GRM(), mc.Constant(4)
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 40, batch=2, dtype=np.float32))
    cache, step = empty(inputs, memory, kind, plan), jax.jit(mc.extend)

    def outputs(lengths):
        _, before = step(cache, **inputs, lengths=jnp.array(lengths))
        part = over_time(inputs, memory, lambda x: x[:, :3])
        return np.asarray(step(before, **part)[0])

    np.testing.assert_array_equal(outputs([0, 0])[0], outputs([0, 37])[0])
