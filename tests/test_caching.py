"""One call: under JAX's transformations, for each platform, and with arguments that do not fit."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from tests.cases import MEMORIES, assert_close, make_inputs, run


@pytest.mark.slow
def test_works_under_other_transformations():
    memory = MEMORIES["titans"]
    inputs = make_inputs(memory, 21)

    def loss(inputs):
        return jnp.sum(run(inputs, memory, mc.GRM()) ** 2)

    half = jax.tree.map(lambda x: 0.5 * x, inputs)
    stacked = jax.tree.map(lambda *xs: np.stack(xs), inputs, half)
    gradient = jax.jit(jax.grad(loss))(inputs)
    remat = jax.jit(jax.grad(jax.checkpoint(loss)))(inputs)
    assert_close(remat, gradient, 1e-4)
    y, gradients = jax.jit(jax.vmap(jax.value_and_grad(loss)))(stacked)
    assert_close(y[0], loss(inputs), 1e-5)
    assert_close(jax.tree.map(lambda x: x[0], gradients), gradient, 1e-4)
    scanned = jax.jit(lambda xs: jax.lax.scan(lambda sum_, x: (sum_ + loss(x), None), 0.0, xs)[0])
    assert_close(scanned(stacked), loss(inputs) + loss(half), 1e-5)


@pytest.mark.usefixtures("every_platform")
def test_schedule_follows_the_platform_lowered_for():
    memory = MEMORIES["titans"]
    traced = jax.jit(
        lambda inputs: run(inputs, memory, mc.Residual(), size=64, schedule=None)
    ).trace(make_inputs(memory, 64))
    loops = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.while")
        for platform in ("cpu", "tpu", "cuda")
    }
    assert loops["cpu"] == loops["tpu"] + 1  # the loop over units
    assert loops["cuda"] == loops["tpu"]


class TestErrors:
    """Each error says what came and what is wanted."""

    MEMORY = MEMORIES["titans"]

    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                dict(query=jnp.ones((2, 20, 3, 4))),
                r"query and key must have the same shape .* got query \(2, 20",
            ),
            (dict(key=jnp.ones((2, 21, 4))), r"key must be \(b, t, h, k\).*\(2, 21, 4\)"),
            (dict(key=jnp.ones((2, 0, 3, 4))), "key must not be empty, got shape"),
            (dict(key=jnp.ones((0, 21, 3, 4))), "key must not be empty, got shape"),
            (dict(value=jnp.ones((2, 21, 1, 4))), r"value must have shape .*got \(2, 21, 1, 4\)"),
            (dict(value=jnp.ones((2, 21, 3, 5))), "needs k = v, got k=4, v=5"),
            (dict(query=jnp.ones((2, 21, 3, 4), int)), "query must be floating point, got int32"),
            (dict(connector=None), "pass connector, shape"),
            (dict(connector=jnp.ones((2, 21, 3, 5))), "connector must have shape"),
            (dict(controls={}), r"missing: \['eta', 'log_alpha', 'log_beta'\]"),
            (dict(weights={}), r"weights of Titans must be \['W1', 'W2'\]; missing"),
            (dict(weights=dict(W2=1, W1=1, W3=1)), r"unknown: \['W3'\]"),
        ],
        ids=lambda x: "+".join(x) if isinstance(x, dict) else "",
    )
    def test_arguments_that_do_not_fit(self, change, message):
        inputs = make_inputs(self.MEMORY, 21) | change
        with pytest.raises(ValueError, match=message):
            run(inputs, self.MEMORY, mc.GRM())

    @pytest.mark.usefixtures("unchecked")
    def test_wrong_shapes_of_controls_and_weights(self):
        inputs = make_inputs(self.MEMORY, 21)
        inputs["controls"]["eta"] = jnp.ones((2, 21, 3, 1))
        with pytest.raises(ValueError, match=r"control eta must have shape \(b, t, h\)"):
            run(inputs, self.MEMORY, mc.GRM())
        inputs = make_inputs(self.MEMORY, 21)
        inputs["controls"]["gamma"] = inputs["controls"]["eta"]
        with pytest.raises(ValueError, match=r"unknown: \['gamma'\]"):
            run(inputs, self.MEMORY, mc.GRM())
        inputs = make_inputs(self.MEMORY, 21)
        inputs["controls"]["log_beta"][1, 2, 0] = 0.25
        call = functools.partial(
            mc.memory_caching,
            memory=self.MEMORY,
            aggregation=mc.GRM(),
            segmentation=mc.Constant(8),
        )
        with pytest.raises(ValueError, match=r"control log_beta must be at most 0, got 0\.25"):
            call(**inputs)
        inputs["weights"]["W2"] = jnp.ones((4, 8, 4))
        with pytest.raises(ValueError, match=r"weight W2 must have shape \(h, out, in\)"):
            run(inputs, self.MEMORY, mc.GRM())

    @pytest.mark.usefixtures("unchecked")
    def test_configuration(self):
        inputs: Any = make_inputs(self.MEMORY, 21)
        unknown: Any = "cuda"
        with pytest.raises(ValueError, match=r"chunk size of Titans, 4, must divide .*size=6"):
            run(inputs, self.MEMORY, mc.GRM(), size=6)
        with pytest.raises(ValueError, match=r"start must be one of .* got 'warm'"):
            run(inputs, self.MEMORY, mc.GRM(), start="warm")
        with pytest.raises(ValueError, match=r"implementation must be one of .* got 'cuda'"):
            mc.memory_caching(
                **inputs,
                memory=self.MEMORY,
                aggregation=mc.GRM(),
                segmentation=mc.Constant(8),
                implementation=unknown,
            )
        sizes: Any = (0, 4.0)
        for size in sizes:
            with pytest.raises(ValueError, match=f"segment size must be .*, got {size}"):
                mc.Constant(size)
        good: Any = dict(memory=self.MEMORY, aggregation=mc.GRM(), segmentation=mc.Constant(8))
        wrong: Any = dict(memory=mc.memories.Titans, aggregation=mc.GRM, segmentation=4)
        for name in wrong:
            with pytest.raises(ValueError, match=f"{name} must be an object such as mc"):
                mc.memory_caching(**inputs, **(good | {name: wrong[name]}))
        with pytest.raises(ValueError, match=r"gate must be one of .* got 'loud'"):
            mc.GRM(gate="loud")
        with pytest.raises(ValueError, match="depth=3"):
            mc.memories.Titans(depth=3)
        with pytest.raises(ValueError, match="chunk_size of Titans must be at least 1, got 0"):
            mc.memories.Titans(chunk_size=0)
