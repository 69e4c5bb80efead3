"""Deep memories with a bound on their steps stay within it, whatever they are given."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from tests.cases import assert_close, make_inputs
from tests.covers import kept_of

DIM, CHUNK, CHUNKS = 4, 64, 2048  # 131,072 tokens
RULES = {
    "titans": mc.memories.Titans(CHUNK, expansion=2, max_step_norm=0.5),
    "titans_depth1": mc.memories.Titans(CHUNK, depth=1, max_step_norm=0.5),
    "dla": mc.memories.DLA(CHUNK, expansion=2, max_step_norm=0.5),
}


def length(matrices):
    return jnp.sqrt(sum(jnp.sum(w**2) for w in matrices))


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.vmap, in_axes=(None, 0, 0, 0))
def lengths(memory, scale, decay, momentum):
    """Of the weights before, and of weights and momentum after each chunk of random tokens."""
    shapes = memory.weight_shapes(DIM, DIM)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    names = zip(keys, shapes, strict=True)
    weights = {name: jax.random.normal(key, shapes[name]) for key, name in names}
    state = memory.init(weights, DIM, DIM, jnp.float64)

    def chunk(state, key):
        """Long tokens, in some chunks all alike, which is what makes a bare memory diverge."""
        rows = scale * jax.random.normal(key, (2, CHUNK, DIM))
        rows = jnp.where(jax.random.bernoulli(key), rows, rows[:, :1])
        eta = jnp.exp(3 * jax.random.normal(key, (CHUNK,)))
        controls = {"eta": eta, "log_alpha": jnp.full(CHUNK, decay)}
        controls["log_beta"] = jnp.full(CHUNK, momentum)
        controls = {name: controls[name] for name in memory.controls}
        state, _ = memory.write(state, state, *rows, controls)
        return state, (length(state.weights), length(state.momentum or (jnp.zeros(()),)))

    keys = jax.random.split(jax.random.key(1), CHUNKS)
    return length(state.weights), *jax.lax.scan(chunk, state, keys)[1]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", kept_of([*RULES], "titans"))
def test_no_input_of_any_scale_exceeds_the_bound(name):
    tokens = CHUNK * np.arange(1, CHUNKS + 1)
    scale, decay, momentum = np.transpose(
        [
            *((1.0, -0.01, -0.1), (1e3, -0.01, -1e-3), (1e20, -0.01, 0.0), (1e3, 0.0, -1e-12)),
            *((1e3, -1e-12, -1e-3), (1e-3, -0.01, -2.0)),
        ]
    )
    first, weights, moments = map(np.asarray, lengths(RULES[name], scale, decay, momentum))
    kept = 1 / np.maximum(-np.expm1(decay), 1e-300)
    longest = first[:, None] + 0.5 * np.minimum(tokens, kept[:, None])
    assert (weights <= longest * (1 + 1e-9)).all()
    assert (moments <= 0.5 * (1 + 1e-9)).all()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", kept_of([*RULES], "dla"))
def test_chunks_equal_tokens_where_steps_are_shortened(name):
    memory = RULES[name]
    small = type(memory)(4, expansion=2, depth=memory.depth, max_step_norm=0.05)
    inputs = make_inputs(small, 21, dim=DIM)
    inputs["value"] *= 10
    inputs = jax.tree.map(jnp.asarray, inputs)

    def run(memory, implementation=None, start: Any = "checkpoint"):
        return mc.memory_caching(
            **inputs,
            memory=memory,
            aggregation=mc.GRM(),
            segmentation=mc.Constant(8),
            start=start,
            implementation=implementation,
        )

    other = type(memory)(4, expansion=2, depth=memory.depth)
    wanted, got, bare = jax.jit(
        lambda: (run(small, "reference"), run(small), run(other, "reference"))
    )()
    assert_close(got, wanted, 1e-12)
    assert np.abs(bare - wanted).max() > 0.1 * np.abs(wanted).max()


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_long_bound_changes_no_bit():
    memory = mc.memories.Titans(4, expansion=2)
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 21, dim=DIM))
    how: Any = dict(aggregation=mc.GRM(), segmentation=mc.Constant(8))
    bare = mc.memory_caching(**inputs, memory=memory, **how)
    long = mc.memories.Titans(4, expansion=2, max_step_norm=1e6)
    np.testing.assert_array_equal(mc.memory_caching(**inputs, memory=long, **how), bare)


@pytest.mark.parametrize("name", kept_of([*RULES], "titans_depth1"))
def test_steps_and_gradients_of_huge_tokens_are_finite_in_float32(name):
    memory = RULES[name]
    small = type(memory)(4, expansion=2, depth=memory.depth, max_step_norm=0.5)
    inputs = make_inputs(small, 12, dim=DIM, dtype=np.float32)
    inputs["value"] *= np.float32(1e20)

    @jax.jit
    def both(inputs):
        def outputs(inputs):
            return mc.memory_caching(
                **inputs,
                memory=small,
                aggregation=mc.Residual(),
                segmentation=mc.Constant(12),
            )

        y, pull = jax.vjp(outputs, inputs)
        return y, pull(jnp.cos(y))[0]

    results = both(inputs)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(results))
    initial = inputs | {"value": np.zeros_like(inputs["value"])}
    assert np.abs(results[0] - both(initial)[0]).max() > 0.1  # shortened, not left out


@pytest.mark.parametrize("bound", [0, -1.0, float("inf"), float("nan")])
def test_bounds_that_are_none(bound):
    with pytest.raises(ValueError, match="max_step_norm of Titans must be positive, or None"):
        mc.memories.Titans(max_step_norm=bound)


@pytest.mark.slow
def test_a_layer_is_bounded_unless_told_otherwise():
    x = 1e6 * jax.random.normal(jax.random.key(0), (1, 100, 64))

    def layer(**options):
        return mc.nn.MemoryCaching(
            64,
            4,
            memory=mc.memories.Titans(chunk_size=16),
            aggregation=mc.GRM(),
            segmentation=mc.Constant(64),
            rngs=nnx.Rngs(0),
            **options,
        )

    bounded: Any = layer()
    bare: Any = layer(bounded=False)
    assert bounded.memory.max_step_norm == 1
    assert bare.memory.max_step_norm is None
    assert jnp.isfinite(nnx.jit(lambda layer, x: layer(x))(bounded, x)).all()
    assert not jnp.isfinite(nnx.jit(lambda layer, x: layer(x))(bare, x)).all()


@pytest.mark.slow
def test_a_layer_of_dla_forgets_unless_told_otherwise():
    def layer(memory):
        return mc.nn.MemoryCaching(
            16,
            2,
            memory=memory,
            aggregation=mc.GRM(),
            segmentation=mc.Constant(2048),
            start="checkpoint",
            rngs=nnx.Rngs(0),
        )

    kept = layer(mc.memories.DLA(decay=False))
    assert "log_alpha" not in kept.operands(jnp.ones((1, 4, 16)))["controls"]
    forgetting = layer(mc.memories.DLA())
    x = jax.random.normal(jax.random.key(1), (1, 20_480, 16))

    @nnx.jit
    def reads(layer, x):
        how: Any = dict(memory=layer.memory, aggregation=mc.Residual(), start="checkpoint")
        return mc.memory_caching(**layer.operands(x), **how, segmentation=mc.Constant(20_480))

    assert jnp.abs(reads(forgetting, x)).max() < 5
    assert jnp.abs(reads(kept, x)).max() > 100
