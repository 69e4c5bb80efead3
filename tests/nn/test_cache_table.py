"""Bytes of a cache by what holds them."""

from flax import nnx

import memcache_jax as mc
from tests.nn.caches import LAYERS, language_model


def test_bytes_of_a_cache():
    cache = language_model().init_cache(2, 40)
    parts = mc.nn.cache_bytes(cache)
    assert sum(parts.values()) == cache.nbytes - cache.position.nbytes - 2 * 2 * 2 * 4
    # 2 layers, 2 rows, 2 heads of dimension 8: 4 segments, and a window of 6.
    assert parts["cached states"] == 2 * 2 * 2 * 4 * 8 * 8 * 4
    assert parts["keys and values"] == 2 * 2 * 2 * 5 * 2 * 8 * 4
    window = LAYERS["window"](nnx.Rngs(0)).init_cache(3)
    assert window.nbytes == 3 * (2 * 4 * 16 + 1) * 4  # keys, values and the position
    assert parts["convolution tails"] == 2 * 2 * 3 * 3 * 16 * 4
