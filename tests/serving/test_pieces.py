"""Arrays in pieces: whole again as they were, and equal pieces kept once."""

import jax.numpy as jnp
import numpy as np

from memcache_jax.serving.pieces import Pieces, join, split


def test_arrays_come_back_and_share_their_pieces():
    rng = np.random.default_rng(0)
    long = rng.standard_normal((2, 5, 100_000), np.float32)  # five slots of 400 kB in each of two
    arrays = [long, np.array(7), np.zeros((3, 0)), np.asarray(jnp.ones((4, 2), jnp.bfloat16))]
    other = [long.copy(), *arrays[1:]]
    other[0][1, 3] += 1
    held, kept = Pieces(), []
    for group in (arrays, other):
        pieces, splits = split(group, [1, 0, 0, 0])
        held.add(pieces, splits)
        kept.append(splits)
    assert len(kept[0][0].digests) == 5
    assert held.nbytes == long.nbytes * 6 // 5 + 8 + 16
    for group, splits in zip((arrays, other), kept, strict=True):
        for x, y in zip(group, join(held.of(splits), splits), strict=True):
            np.testing.assert_array_equal(x, y)
            assert x.dtype == y.dtype
    back = join(held.of(kept[1]), kept[1])
    back[0][:] = 0
    np.testing.assert_array_equal(join(held.of(kept[1]), kept[1])[0], other[0])
    held.drop(kept[0])
    assert held.nbytes == long.nbytes + 8 + 16
    held.drop(kept[1])
    assert held.nbytes == 0
    assert not dict(held)


def test_small_parts_go_together():
    x = np.arange(100_000, dtype=np.int32).reshape(1, -1)
    pieces, (of_x,) = split([x], [1])
    assert pieces[of_x.digests[0]].shape == (1, 256)  # 1 KiB  # 64 KiB
    np.testing.assert_array_equal(join([[pieces[d] for d in of_x.digests]], [of_x])[0], x)
