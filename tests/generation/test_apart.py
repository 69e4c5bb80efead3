"""A module apart from its arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memcache_jax.generation.apart import apart


def test_equal_modules_have_one_frame():
    one, other = (nnx.Linear(3, 4, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    (frame, arrays), (same, others) = apart(one), apart(other)
    assert frame is same
    assert apart(nnx.Linear(3, 5, rngs=nnx.Rngs(0)))[0] is not frame
    call: Any = jax.jit(lambda arrays, x, frame: frame.merge(arrays)(x), static_argnames="frame")
    x = jnp.arange(3.0)[None]
    for module, own in ((one, arrays), (other, others)):
        np.testing.assert_allclose(call(own, x, frame=frame), module(x), rtol=1e-6)
    assert call._cache_size() == 1
