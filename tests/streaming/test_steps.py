"""The steps of a call: how many there are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.streaming import steps
from tests.cases import MEMORIES, make_inputs
from tests.streams import empty, over_time


@pytest.mark.parametrize(
    "memory", ["gated_deltanet", pytest.param("titans", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("rewind", [0, 3])
def test_tokens_of_one_chunk_are_taken_at_once(monkeypatch, memory, rewind):
    """Of calls that begin and end anywhere, and so that each row may go back."""
    taken, memory = [], MEMORIES[memory]

    def count_steps(cache, piece, active, *args, **options):
        jax.debug.callback(lambda active: taken.append(active.any()), active, ordered=True)
        return take_piece(cache, piece, active, *args, **options)

    take_piece = steps.take_piece
    monkeypatch.setattr(steps, "take_piece", count_steps)
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 14, heads=1, dtype=np.float32))
    cache = empty(inputs, memory, mc.GRM(), mc.Constant(4), rewind=rewind)
    for begin, end, wanted in ((0, 3, 1), (3, 6, 2), (6, 7, 1), (7, 14, 3)):
        part = over_time(inputs, memory, lambda x, p=slice(begin, end): x[:, p])
        _, cache = jax.jit(mc.extend)(cache, **part)
        jax.effects_barrier()
        assert sum(taken) == wanted
        taken.clear()
