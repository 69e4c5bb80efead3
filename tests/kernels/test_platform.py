"""Kernels asked for by name, in programs for their own platform and for others."""

import jax
import jax.numpy as jnp
import pytest

import memcache_jax as mc
from memcache_jax.kernels._triton import lowered_for_gpu
from tests.kernels.interpreters import KERNELS

pytestmark = pytest.mark.usefixtures("every_platform")

OTHERS = {"pallas_tpu": ("cpu", "cuda"), "pallas_gpu": ("cpu", "tpu")}
X = jnp.ones((1, 128, 1, 128))


def loss(x, implementation):
    y = mc.memory_caching(
        *(x, x, x, x),
        memory=mc.memories.LinearAttention(),
        aggregation=mc.GRM(),
        segmentation=mc.Constant(64),
        implementation=implementation,
    )
    return y.sum()


@pytest.mark.parametrize("implementation", KERNELS)
def test_a_call_on_another_platform_is_refused_at_once(implementation):
    wanted = f"kernels of implementation='{implementation}' are for .* compiled for cpu"
    with pytest.raises(NotImplementedError, match=wanted):
        loss(X, implementation)
    with pytest.raises(NotImplementedError, match=wanted):
        jax.jit(loss, static_argnums=1)(X, implementation)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", KERNELS)
def test_the_platform_is_the_one_compiled_for(implementation):
    # Closed over, the array is a CPU's, which is no matter.
    every = jax.jit(lambda w: jax.vmap(jax.grad(loss), (0, None))(w * X[None], implementation))
    constant = jax.jit(lambda w: w * loss(X, implementation))
    for function in every, constant:
        traced = function.trace(1.0)
        for platform in OTHERS[implementation]:
            with pytest.raises(NotImplementedError, match=f"compiled for {platform}"):
                traced.lower(lowering_platforms=(platform,))
        if implementation == "pallas_tpu":
            text = traced.lower(lowering_platforms=("tpu",)).as_text()
            assert text.count("tpu_custom_call")
        else:
            assert "triton" in lowered_for_gpu(function, 1.0).as_text()
