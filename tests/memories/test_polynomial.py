"""Polynomial features: their inner products, and every path of memories that read them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.memories.polynomial import num_features, polynomial
from tests.cases import assert_close, make_inputs, value_and_vjp
from tests.covers import kept_of
from tests.streams import empty, over_time

CASES = {
    "titans": (mc.memories.Titans(4, expansion=2, degree=2), mc.GRM(), "independent"),
    "soup": (mc.memories.DLA(4, expansion=1, degree=2), mc.Soup(), "checkpoint"),
    "ssc": (mc.memories.Titans(2, depth=1, degree=2), mc.SSC(top_k=2), "independent"),
}


@pytest.mark.usefixtures("x64")
def test_inner_products():
    x, y = np.random.default_rng(0).standard_normal((2, 3, 5))
    assert polynomial(jnp.asarray(x)).shape == (3, num_features(5)) == (3, 20)
    inner = jnp.sum(polynomial(jnp.asarray(x)) * polynomial(jnp.asarray(y)), axis=-1)
    by_hand = np.sum(x * y, axis=-1)
    assert_close(inner, by_hand + by_hand**2, 1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", kept_of(CASES, "soup", "ssc"))
def test_every_path(case):
    """One pass with gradients and packed documents against the recurrence, and a stream."""
    memory, aggregation, start = case
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 22, batch=1, heads=1))
    how: Any = dict(
        memory=memory, aggregation=aggregation, segmentation=mc.Constant(8), start=start
    )
    ids = jnp.array([[0] * 10 + [1] * 12])

    def both(inputs, **options):
        return [mc.memory_caching(**inputs, **how, document_ids=d, **options) for d in (None, ids)]

    fast = value_and_vjp(both, inputs)
    slow = value_and_vjp(lambda inputs: both(inputs, implementation="reference"), inputs)
    assert_close(fast, slow, 1e-9)

    step, outputs = jax.jit(mc.extend), []
    cache = empty(inputs, memory, aggregation, mc.Constant(8), start, rewind=3)
    for begin, count, back in ((0, 5, 0), (5, 11, 3), (13, 9, 0)):
        part = over_time(inputs, memory, lambda x, b=begin, c=count: x[:, b : b + c])
        y, cache = step(cache, **part)
        outputs.append(y[:, : count - back])
        cache = cache.rewind(back) if back else cache
    assert_close(jnp.concatenate(outputs, axis=1), fast[0][0], 1e-10)


@pytest.mark.usefixtures("x64")
def test_a_network_by_hand():
    """M(x) = x + W1 gelu(W2 phi(x)), with the initial weights."""
    memory = mc.memories.Titans(4, expansion=2, degree=2)
    normal = np.random.default_rng(0).standard_normal
    first, second, x = normal((6, 9)), normal((3, 6)), normal((2, 3))
    assert memory.weight_shapes(3, 3) == {"W2": (6, 9), "W1": (3, 6)}
    state = memory.init({"W2": jnp.asarray(first), "W1": jnp.asarray(second)}, 3, 3, jnp.float64)
    y = memory.read(memory.matrices(state), jnp.asarray(x))
    i, j = np.array([(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]).T
    features = np.concatenate([x, x[:, i] * x[:, j] * np.where(i == j, 1, 2**0.5)], axis=1)
    assert_close(y, x + jax.nn.gelu(features @ first.T) @ second.T, 1e-12)


def test_what_is_refused():
    memory = mc.memories.Titans(4, depth=1, degree=2)
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 8, batch=1, heads=1, dtype=np.float32))
    how: Any = dict(memory=memory, aggregation=mc.GRM(), segmentation=mc.Constant(4))
    with pytest.raises(ValueError, match="Titans has degree 1 or 2, got degree=3"):
        mc.memories.Titans(degree=3)
    for kernels in ("pallas_tpu", "pallas_gpu"):
        with pytest.raises(NotImplementedError, match="Titans has degree=2, must be 1"):
            jax.eval_shape(
                lambda kernels=kernels: mc.memory_caching(**inputs, **how, implementation=kernels)
            )
