"""Meshes of many chips: how parameters, batches and sequences are laid out over them."""

from memcache_jax.sharding.mesh import AXES, make_mesh
from memcache_jax.sharding.names import constrain
from memcache_jax.sharding.states import batch_sharding, param_shardings, state_shardings

__all__ = [
    "AXES",
    "batch_sharding",
    "constrain",
    "make_mesh",
    "param_shardings",
    "state_shardings",
]
