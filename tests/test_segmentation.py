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


def test_logarithmic_plan_of_a_prefix_reads_the_same_buckets():
    whole, part = mc.Logarithmic(4).plan(40), mc.Logarithmic(4).plan(23)
    for block in range(6):
        first, second = (
            plan.buckets[[i for i in plan.reads[block] if i >= 0]].tolist()
            for plan in (whole, part)
        )
        assert first == second


def test_lengths_are_segments_of_several_blocks():
    plan = mc.Lengths((8, 4, 12)).plan(21)
    assert plan.block_size == 4
    assert plan.first.tolist() == [0, 0, 2, 3, 3, 3]
    assert plan.buckets.tolist() == [[0, 2], [2, 3]]
    assert plan.reads.tolist() == [[-1, -1]] * 2 + [[0, -1]] + [[0, 1]] * 3
    assert plan.distances[5].tolist() == [2, 1]
    assert mc.Lengths((8, 4, 12)).longest == 24
    assert mc.Constant(4).longest is mc.Logarithmic(4).longest is None
    with pytest.raises(ValueError, match="hold 24 tokens, got 25"):
        mc.Lengths((8, 4, 12)).plan(25)
    with pytest.raises(ValueError, match="at least one segment"):
        mc.Lengths(())
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        mc.Lengths((8, 0))
