"""What blocks do to each token alone."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

import memcache_jax as mc
from tests.cases import assert_close


def test_squared_relu():
    layer = mc.nn.SquaredMLP(5, use_bias=True).build(3, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 3)), jnp.float32)
    hidden = np.maximum(np.asarray(x) @ np.asarray(layer.up.kernel[...]), 0) ** 2
    assert_close(layer(x), hidden @ np.asarray(layer.down.kernel[...]), 1e-5)
