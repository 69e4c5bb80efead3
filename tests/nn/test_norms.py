"""Norms as published models have them."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc


@pytest.mark.parametrize(
    "norm", [mc.nn.Norm(), mc.nn.Norm(offset=1.0), mc.nn.Norm("layer")], ids=str
)
def test_they_are_their_equations(norm):
    layer = norm.build(5, dtype=None, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((2, 3, 5)).astype(np.float32)
    centered = x - x.mean(-1, keepdims=True) if norm.kind == "layer" else x
    wanted = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + norm.epsilon)
    np.testing.assert_allclose(layer(jnp.asarray(x)), wanted, atol=1e-6)
    layer.scale.set_value(layer.scale[...] + 0.5)
    np.testing.assert_allclose(layer(jnp.asarray(x)), 1.5 * wanted, atol=1e-6)
