"""Delta rules with decays of any strength."""

import jax
import numpy as np
import pytest

import memcache_jax as mc
from tests.cases import assert_close, make_inputs, run, run_reference, scheduled, value_and_vjp

DECAYS = (0.0, -1e-3, -1.0, -30.0, -88.5, -200.0, -1e4, -np.inf)


@pytest.mark.slow
@pytest.mark.parametrize(
    "memory",
    [mc.memories.GatedDeltaNet(), mc.memories.GDN2(), mc.memories.RWKV7()],
    ids=lambda memory: type(memory).__name__,
)
def test_decays_of_any_strength_are_exact(memory):
    inputs = make_inputs(memory, 70, batch=1, heads=2, dtype=np.float32)
    (name,) = (name for name in inputs["controls"] if name.startswith("log_"))
    draw = np.random.default_rng(3).choice
    inputs["controls"][name][:] = draw(DECAYS, inputs["controls"][name].shape)

    def outputs(inputs, run=run):
        return run(inputs, memory, mc.GRM(), size=35)

    with scheduled("in_turn"):
        got = value_and_vjp(outputs, inputs)
    with jax.enable_x64(True):
        exact = jax.tree.map(np.float64, inputs)
        wanted = value_and_vjp(lambda inputs: outputs(inputs, run_reference), exact)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
    assert_close(got[0], wanted[0], 2e-6)
    assert_close(got[1], wanted[1], 4e-6)
