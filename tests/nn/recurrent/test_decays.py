"""Decays that are constants, and decays that make the key."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from memcache_jax.nn import recurrent


@pytest.mark.parametrize("least", [0.0, 1e-9, 0.25])
def test_a_forget_gate_is_accurate_near_0_and_near_1(least):
    logits = np.array([-80, -20, -3, 0, 3, 20, 80], np.float32)
    part = recurrent.ForgetGate(least).build(1, 1, 1)
    inputs = recurrent.LayerInput(jnp.zeros((1, 1, 1)))
    got = part(inputs, lambda x: x, {"key": jnp.asarray(logits)})
    z = logits.astype(np.float64)
    left = (1 - least) / (1 + np.exp(z))
    low, high = z[z <= 0], left[z > 0]  # log f from f where it is small, and from 1 - f
    log_f = np.log(least + (1 - least) / (1 + np.exp(-low))), np.log1p(-high)
    np.testing.assert_allclose(got["key"], left, rtol=1e-6)
    np.testing.assert_allclose(got["log_alpha"], np.concatenate(log_f), rtol=2e-6)


def test_fixed_decays_replace_those_of_the_rule():
    path = recurrent.Path(2, 4)
    memory, x = mc.memories.RetNet(), jnp.ones((1, 3, 8))
    rates = {"own": (), "fixed": (recurrent.FixedDecay((0.5, 0.0)),)}
    got = {
        name: recurrent.RecurrentMixer(memory, path, path, path, parts)
        .build(8, rngs=nnx.Rngs(0))
        .operands(x)["controls"]["log_gamma"]
        for name, parts in rates.items()
    }
    np.testing.assert_array_equal(got["fixed"], [-0.5, 0.0])
    np.testing.assert_allclose(got["own"], np.log1p([-(2.0**-5), -(2.0**-6)]), rtol=1e-6)


def test_as_many_fixed_decays_as_heads():
    path = recurrent.Path(2, 4)
    parts = (recurrent.FixedDecay((0.5,)),)
    mixer = recurrent.RecurrentMixer(mc.memories.RetNet(), path, path, path, parts)
    with pytest.raises(ValueError, match="rates must be 2 numbers, one per head, got 1"):
        mixer.build(8, rngs=nnx.Rngs(0))
