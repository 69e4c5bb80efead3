"""Layers that read what another layer chose."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.caching import in_group
from memcache_jax.choice import FollowingSSC, choice_of
from memcache_jax.engine.types import OfBlocks
from tests.cases import MEMORIES, make_inputs


def test_a_choice_has_the_states_with_gates_and_room_for_all():
    """Of three slots a token reads two at most; with one slot, one state is missing."""
    states, live = np.array([[[-1, 0, 2]]]), jnp.full((1, 1, 1, 2), 0.5)
    gates = jnp.asarray([[0.0, 0.25, 0.25], [0.0, 0.0, 0.5]]).reshape(1, 1, 1, 2, 3)
    got = choice_of(OfBlocks(states, gates, live), 2)[0, 0, 0]
    assert got[0].tolist() == [0, 2, 0.25, 0.25, 0.5]
    assert got[1, [0, 2, 3, 4]].tolist() == [2, 0.5, 0, 0.5]
    one = choice_of(OfBlocks(states[..., 1:2], gates[..., 1:2], live), 2)[0, 0, 0]
    assert one[0].tolist() == [0, -1, 0.25, 0, 0.5]


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_followers_read_what_the_first_layer_chose():
    """With all arguments equal they read what it reads; a gradient passes through its gates."""
    memory = MEMORIES["linear"]
    how: dict[str, Any] = dict(memory=memory, segmentation=mc.Constant(3))
    one, other = (
        jax.tree.map(jnp.asarray, make_inputs(memory, 16, batch=1, heads=2, seed=seed))
        for seed in (0, 1)
    )

    @jax.jit
    def both(one, other):
        y, states = in_group(**one, aggregation=mc.SSC(2), **how, hands_on=True)
        own, chosen = states._replace(chosen=None), dict(connector=states.chosen)
        follow: dict[str, Any] = dict(given=own, aggregation=FollowingSSC(2), **how)
        return y, in_group(**one | chosen, **follow), in_group(**other | chosen, **follow)

    y, same, _ = both(one, other)
    np.testing.assert_allclose(same, y, atol=1e-12)
    gradient = jax.grad(lambda one: both(one, other)[2].sum())(one)
    assert float(jnp.abs(gradient["connector"]).max()) > 0
