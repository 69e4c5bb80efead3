"""Read plans: which buckets there are and who reads them."""

import numpy as np
import pytest

import memcache_jax as mc


@pytest.mark.parametrize("length", [1, 4, 5, 23, 24, 25])
def test_constant_reads_every_earlier_segment(length):
    plan = mc.Constant(4).plan(length)
    assert plan.block_size == 4
    assert plan.num_blocks == -(-length // 4)
    buckets = np.array([[i, i + 1] for i in range(plan.num_blocks - 1)]).reshape(-1, 2)
    np.testing.assert_array_equal(plan.buckets, buckets)
    for block, reads in enumerate(plan.reads):
        assert [i for i in reads if i >= 0] == list(range(block))


def test_plan_of_a_prefix_is_a_prefix_of_the_plan():
    whole = mc.Constant(4).plan(40)
    part = mc.Constant(4).plan(17)
    np.testing.assert_array_equal(part.reads, whole.reads[:5, :4])
