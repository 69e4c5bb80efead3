"""Segments that end where the content changes: sizes, bounds, and the choice itself."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 37])
def test_the_plan_has_the_most_states(length):
    segmentation = mc.Adaptive(8, 16, block=4)
    plan = segmentation.plan(length)
    assert plan.block_size == segmentation.size == 4
    assert plan.num_blocks == -(-length // 4)
    assert len(plan.buckets) == segmentation.most_states(length) == max(0, length - 1) // 8
    for block, reads in enumerate(plan.reads):
        assert [i for i in reads if i >= 0] == list(range(block // 2))


def test_a_prefix_has_the_same_slots():
    whole, part = (mc.Adaptive(4, 8).plan(length) for length in (40, 17))
    np.testing.assert_array_equal(part.reads, whole.reads[:5, :4])
    assert mc.Adaptive(4, 8).span(3) == 12


def test_a_segment_ends_where_keys_turn():
    segmentation = mc.Adaptive(8, 16, 0.4, block=4)
    one, other = jnp.eye(4)[:2]
    segment = jnp.stack([jnp.stack([one, one])] * 6)
    rows = (one, one), (one, other), (other, other), (other, other), (one, one), (-one, -one)
    block = jnp.stack([jnp.stack(row) for row in rows])
    before = jnp.array([1, 1, 1, 0, 3, 0])
    ends = segmentation.ends(before, segment, block)
    # The mean over heads counts; a first block is never surprising; max ends any.
    assert ends.tolist() == [False, True, True, False, True, False]
    assert not mc.Adaptive(8, 16, 0.6, block=4).ends(before, segment, block)[1]
    assert mc.Adaptive(12, 16, 0.4, block=4).ends(before, segment, block).tolist() == [
        *[False] * 4,
        True,
        False,
    ]


def test_keys_without_a_direction_end_no_segment_early():
    ends = mc.Adaptive(4, 16, 1.5).ends
    zero, one, unknown = (jnp.full((1, 1, 2), x) for x in (0.0, 1.0, np.nan))
    for segment, block in ((zero, one), (one, zero), (unknown, one), (one, unknown)):
        assert not ends(jnp.array([1]), segment, block)
        assert ends(jnp.array([3]), segment, block)


def test_bad_sizes():
    several: Any = (dict(min=8, max=4), dict(min=8, max=12), dict(min=8, max=16, block=3))
    for sizes in several:
        with pytest.raises(ValueError, match="both multiples of block, got min=8"):
            mc.Adaptive(**sizes)
    with pytest.raises(ValueError, match="min must be at least 1, got 0"):
        mc.Adaptive(0, 8)
    with pytest.raises(ValueError, match="threshold"):
        mc.Adaptive(8, 16, -0.1)
