"""The names of axes, and the mesh's axes that stand for them."""

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax.sharding import constrain


def test_without_a_mesh_nothing_changes():
    x = jnp.ones((3, 5))
    assert constrain(x, "batch", None) is x
    with jax.set_mesh(jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))):
        np.testing.assert_array_equal(constrain(x, "batch", None), x)
