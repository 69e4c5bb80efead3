"""Meshes, and constraints on where arrays lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from memcache_jax.sharding import AXES, constrain, make_mesh
from memcache_jax.sharding.mesh import fit


def test_one_axis_takes_what_is_left():
    mesh = make_mesh(dict(fsdp=-1, tensor=2))
    assert dict(mesh.shape) == dict(data=1, fsdp=4, seq=1, tensor=2)
    assert mesh.axis_names == AXES


@pytest.mark.parametrize(
    ("sizes", "slices", "message"),
    [
        (dict(model=2), 1, "has the axes data, fsdp, seq, tensor, got model"),
        (dict(data=3), 1, "8 devices, which a mesh of data=3"),
        (dict(data=-1, fsdp=-1), 1, "does not fill"),
        (dict(data=0), 1, "does not fill"),
        (dict(tensor=8), 2, "multiple of the 2 slices"),
    ],
)
def test_sizes_that_do_not_fit(sizes, slices, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(sizes, slices=slices)


def test_axes_that_do_not_divide_are_left_out():
    mesh = make_mesh(dict(fsdp=2, seq=2, tensor=2))
    over = ("fsdp", "seq")
    for size, wanted in (8, over), (6, "fsdp"), (5, None):
        x = jax.ShapeDtypeStruct((size, 3), jnp.float32)
        assert fit(P(over, "tensor"), x, mesh) == P(wanted, None)


def test_without_a_mesh_nothing_changes():
    x = jnp.ones((3, 5))
    assert constrain(x, "batch", None) is x
    with jax.set_mesh(jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))):
        np.testing.assert_array_equal(constrain(x, "batch", None), x)
