"""A state saved before a parameter was renamed still loads."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from memcache_jax.nn.layers import SwiGLU
from memcache_jax.nn.upgrade import with_saved_names


def with_earlier_names(tree) -> Any:
    saved = {"query_conv": 0, "gate": 0}
    return with_saved_names(tree, saved)


@pytest.mark.slow
def test_a_state_of_before():
    layer = mc.nn.MemoryCaching(
        8,
        2,
        memory=mc.memories.SSD(),
        aggregation=mc.GRM(),
        segmentation=mc.Constant(4),
        rngs=nnx.Rngs(0),
    )
    model = nnx.Dict(mixer=layer, mlp=SwiGLU(8, 8, rngs=nnx.Rngs(1)))
    graph, state = nnx.split(model)
    before = with_earlier_names(state)
    assert set(before["mixer"]) - set(state["mixer"]) == {"gate"}
    assert set(before["mlp"]) == {"gate", "up", "down"}
    upgraded = mc.nn.upgrade_params(before)
    assert jax.tree.structure(upgraded) == jax.tree.structure(state)
    x = jnp.ones((1, 9, 8))
    new: Any = nnx.merge(graph, upgraded)
    np.testing.assert_array_equal(new["mixer"](x), layer(x))
    # Names of now stay, in other containers too.
    pure = nnx.to_pure_dict(state)
    assert jax.tree.structure(mc.nn.upgrade_params(pure)) == jax.tree.structure(pure)
    moments = (jnp.zeros(()), [nnx.to_pure_dict(before)])
    assert jax.tree.structure(mc.nn.upgrade_params(moments)) == jax.tree.structure(
        (jnp.zeros(()), [pure])
    )
