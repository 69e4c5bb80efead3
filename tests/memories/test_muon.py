"""The Muon step of deep memories: every path matches the recurrence, and none gives NaN."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.memories.muon import orthogonalized
from tests.cases import assert_close, make_inputs
from tests.covers import kept_of
from tests.streams import empty, over_time

CASES = {
    "titans": (mc.memories.Titans(4, expansion=2, ns_steps=5), "independent"),
    "dla": (mc.memories.DLA(4, depth=1, ns_steps=3), "checkpoint"),
    "online": (mc.memories.Titans(1, depth=1, ns_steps=5), "independent"),
}


@pytest.mark.usefixtures("x64")
def test_singular_values():
    step = 1e-3 * np.random.default_rng(0).standard_normal((6, 9))
    left, values, right = np.linalg.svd(step, full_matrices=False)
    length = np.linalg.norm(step)
    wanted = values / length
    for _ in range(5):
        wanted = 3.4445 * wanted - 4.775 * wanted**3 + 2.0315 * wanted**5
    wanted *= length / np.linalg.norm(wanted)
    assert wanted.max() / wanted.min() < 2 < values.max() / values.min()
    for x, y in ((step, (left * wanted) @ right), (step.T, right.T @ (left * wanted).T)):
        assert_close(orthogonalized(jnp.asarray(x), 5), y, 1e-12)
    zero = jnp.zeros((6, 9))
    value, pull = jax.vjp(lambda x: orthogonalized(x, 5), zero)
    assert not value.any()
    assert jnp.isfinite(pull(jnp.ones_like(zero))[0]).all()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", kept_of(CASES, "titans"))
def test_every_path(case):
    """One pass, a stream with rewind, and packed documents, against the recurrence."""
    memory, start = case
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 22, batch=1, heads=1))
    how: Any = dict(memory=memory, aggregation=mc.GRM(), segmentation=mc.Constant(8), start=start)
    documents = jnp.array([[0] * 10 + [1] * 12])

    @jax.jit
    def one_pass(inputs, documents=None):
        return mc.memory_caching(**inputs, **how, document_ids=documents)

    for ids in (None, documents):
        wanted = mc.memory_caching(**inputs, **how, document_ids=ids, implementation="reference")
        assert_close(one_pass(inputs, ids), wanted, 1e-10)
    wanted = one_pass(inputs)
    chunk = memory.chunk_size
    without = dict(memory=dataclasses.replace(memory, ns_steps=0))
    plain = mc.memory_caching(**inputs, **how | without)
    assert_close(plain[:, :chunk], wanted[:, :chunk], 1e-12)
    assert abs(plain - wanted)[:, chunk:].max() > 1e-3

    step, outputs = jax.jit(mc.extend), []
    cache = empty(inputs, memory, mc.GRM(), mc.Constant(8), start, rewind=3)
    for begin, count, back in ((0, 5, 0), (5, 11, 3), (13, 5, 0), (18, 4, 0)):
        part = over_time(inputs, memory, lambda x, b=begin, c=count: x[:, b : b + c])
        y, cache = step(cache, **part)
        outputs.append(y[:, : count - back])
        cache = cache.rewind(back) if back else cache
    assert_close(np.concatenate(outputs, axis=1), wanted, 1e-10)


@pytest.mark.slow
def test_tokens_that_write_nothing():
    memory = mc.memories.Titans(4, depth=1, ns_steps=5, max_step_norm=1)
    inputs = make_inputs(memory, 9, batch=1, heads=1, dtype=np.float32)
    inputs = jax.tree.map(jnp.asarray, inputs)
    inputs["controls"]["eta"] *= 0

    @jax.jit
    @jax.value_and_grad
    def loss(inputs):
        y = mc.memory_caching(
            **inputs, memory=memory, aggregation=mc.Residual(), segmentation=mc.Constant(4)
        )
        return jnp.sum(y**2)

    value, gradients = loss(inputs)
    assert jnp.isfinite(value)
    for gradient in jax.tree.leaves(gradients):
        assert jnp.isfinite(gradient).all()


def test_what_is_refused():
    memory = mc.memories.Titans(4, depth=1, ns_steps=5)
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 8, batch=1, heads=1, dtype=np.float32))
    how: Any = dict(memory=memory, aggregation=mc.GRM(), segmentation=mc.Constant(4))

    class Own(mc.memories.Titans):
        pass

    with pytest.raises(ValueError, match="ns_steps of DLA must be at least 0, got -1"):
        mc.memories.DLA(ns_steps=-1)
    with pytest.raises(ValueError, match="Own has form='scan', whose chunks may be written in"):
        Own(ns_steps=5)
    for kernels in ("pallas_tpu", "pallas_gpu"):
        with pytest.raises(NotImplementedError, match="Titans has ns_steps=5, must be 0"):
            jax.eval_shape(
                lambda kernels=kernels: mc.memory_caching(**inputs, **how, implementation=kernels)
            )


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_borders_by_errors():
    """The memory whose errors decide ends its chunks with the step too."""
    memory = mc.memories.DLA(2, depth=1, expansion=1, ns_steps=5)
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 40, batch=8, heads=1))
    how: Any = dict(
        memory=memory,
        aggregation=mc.GRM(),
        segmentation=mc.Adaptive(4, 16, 0.1, block=4, by="errors"),
    )
    wanted = mc.memory_caching(**inputs, **how, implementation="reference")
    assert_close(mc.memory_caching(**inputs, **how), wanted, 1e-9)
