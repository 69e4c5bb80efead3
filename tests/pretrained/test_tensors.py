"""Parameters as parts of a file's tensors."""

import numpy as np
import pytest

from memcache_jax.pretrained.tensors import Part, Tensor

SIZES = [(4, 6), (4, 2), (4, 4)]  # as our kernels are: (in, out)
PARTS = tuple(Part(name, "matrix") for name in ("a", "b", "c"))


def test_the_rows_of_a_part_are_those_that_it_is_cut_from():
    tensor = Tensor(("fused",), PARTS)
    joined = np.random.default_rng(0).random((12, 4))
    for number, wanted in enumerate(tensor.cut(joined, SIZES)):
        rows = tensor.rows_of(number, SIZES)
        assert rows is not None
        got = tensor.part_of(number, joined[rows], SIZES[number])
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    "tensor",
    [
        Tensor(("one", "other"), PARTS),
        Tensor(("in turns",), PARTS, groups=2),
        Tensor(("stacked",), PARTS, axis=1),
    ],
    ids=lambda tensor: tensor.names[0],
)
def test_parts_without_rows_of_their_own(tensor):
    assert tensor.rows_of(1, SIZES) is None


def test_one_part_is_the_whole():
    tensor = Tensor(("alone",), (Part("a", "matrix"),))
    assert tensor.rows_of(0, [(4, 6)]) == slice(None)
