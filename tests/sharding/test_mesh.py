"""The mesh of a training run."""

import pytest

from memcache_jax.sharding import AXES, make_mesh


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
