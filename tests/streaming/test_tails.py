"""Tails of convolutions, and those before them."""

import jax.numpy as jnp
import numpy as np

from memcache_jax.streaming.ring import Ring
from memcache_jax.streaming.tails import earlier_tails, next_tails


def test_tails_of_every_length_before():
    """A tail is the last two numbers of a row, which are its positions."""
    size, tails = 3, (jnp.zeros((2, 2)),)
    past, position = Ring(size, tails).empty(2), jnp.array([0, 0])
    seen = [[0.0, 0.0], [0.0, 0.0]]
    for counts in ([4, 1], [1, 0], [2, 5]):
        x = jnp.array([[len(row) - 2.0 + i for i in range(5)] for row in seen]) + 1

        def call(taken, x=x, tails=tails):
            rows = jnp.concatenate([tails[0], x], axis=1)
            last = jnp.take_along_axis(rows, taken[:, None] + jnp.arange(2)[None], axis=1)
            return x.sum(), (last,)

        (total, tails), past = next_tails(
            call, past, size, tails, position, jnp.array(counts), most=5, first=None
        )
        assert total == x.sum()
        position += jnp.array(counts)
        for row, count, new in zip(seen, counts, x.tolist(), strict=True):
            row += new[:count]
        for ago in range(size + 1):
            then = jnp.maximum(position - ago, 0)
            (got,) = earlier_tails(tails, past, size, position, then, None)
            wanted = [row[p : p + 2] for row, p in zip(seen, then.tolist(), strict=True)]
            np.testing.assert_array_equal(got, wanted)
