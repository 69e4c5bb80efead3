"""How one array lies on a mesh."""

import jax
import jax.numpy as jnp

from memcache_jax.sharding import make_mesh
from memcache_jax.sharding.layout import dividing


def test_axes_that_do_not_divide_are_left_out():
    mesh = make_mesh(dict(fsdp=2, seq=2, tensor=2))
    over = ("fsdp", "seq")
    for size, wanted in (8, over), (6, ("fsdp",)), (5, ()):
        x = jax.ShapeDtypeStruct((size, 3), jnp.float32)
        assert dividing([over, ("tensor",)], x, mesh) == [wanted, ()]
