"""The bank of a cache's slots: which of them a step reads."""

import jax
import jax.numpy as jnp
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
def test_only_the_first_slots_are_read_while_the_others_are_empty(monkeypatch, kind, plan):
    """None, a quarter, or all; and the outputs are those of one pass."""
    counts, first = [], SlotBank._first

    def counted(bank, count, *args):
        jax.debug.callback(lambda: counts.append(count))
        return first(bank, count, *args)

    monkeypatch.setattr(SlotBank, "_first", counted)
    memory, kind = MEMORIES["titans"], KINDS[kind]
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 36, heads=1))
    cache, step = empty(inputs, memory, kind, plan), jax.jit(mc.extend)
    slots = cache.config.slots.num_slots
    outputs, read = [], []
    for t in range(36):
        y, cache = step(cache, **over_time(inputs, memory, lambda x, t=t: x[:, t : t + 1]))
        jax.effects_barrier()
        outputs.append(y)
        read.append(max(counts, default=0))
        counts.clear()
    if plan == mc.Constant(4):
        assert read == [0] * 4 + [2] * 8 + [8] * 24
    assert sorted(set(read)) == ([0, slots // 4, slots] if slots >= 8 else [0, slots])
    assert_close(jnp.concatenate(outputs, 1), whole(inputs, memory, kind, plan), 1e-12)
