"""Every implementation of the chunked update against the reference, forward and backward."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.engine import read
from memcache_jax.kernels import _table
from memcache_jax.kernels._dispatch import interpret_kernels
from memcache_jax.kernels.chunk_update import Edges, chunk_update
from memcache_jax.memories.deep_chunk import DeepState
from tests.cases import (
    FAMILIES,
    MEMORIES,
    SCHEDULES,
    assert_close,
    make_inputs,
    normals,
    scheduled,
    value_and_vjp,
)
from tests.covers import first_kept, kept_of
from tests.kernels.interpreters import finds_races


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("memory", kept_of(FAMILIES, "titans", fast=["linear"]))
def test_xla_equals_reference(memory):
    inputs = make_inputs(memory, 12, batch=2, heads=3)

    def heads_first(x):
        x = jnp.moveaxis(x, 2, 1)
        return x.reshape(*x.shape[:2], -1, memory.gradient_chunk or 4, *x.shape[3:])

    tokens = (inputs["query"], inputs["key"], inputs["value"], inputs["controls"])
    rows = jax.tree.map(heads_first, tokens)
    state = jax.vmap(lambda weights: memory.init(weights, 4, 4, jnp.float64), axis_size=3)(
        inputs["weights"]
    )
    state = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), state)

    def chunk(state, rows):
        query, key, value, controls = rows
        end, view = memory.write(state, state, key, value, controls)
        return end, memory.read_online(view, query)

    def outputs(implementation):
        return value_and_vjp(
            lambda s, r: chunk_update(chunk, s, r, batch_dims=2, implementation=implementation),
            state,
            rows,
        )

    wanted = outputs("reference")
    for schedule in SCHEDULES:
        with scheduled(schedule):
            got = outputs("xla")
        assert_close(got[0], wanted[0], 1e-12)
        assert_close(got[1], wanted[1], 1e-10, scale=1.0)


def test_unknown_implementation():
    with pytest.raises(ValueError, match="got 'cuda'"):
        chunk_update(lambda s, r: (s, r), 0.0, 0.0, batch_dims=0, implementation="cuda")


def written(memory, kind, implementation, states, rows):
    def chunk(state, rows):
        query, key, value, controls = rows
        end, view = memory.write(state, state, key, value, controls)
        return end, read.keep(memory, kind.needs(memory), view, query)

    return chunk_update(chunk, states, rows, batch_dims=1, implementation=implementation)


@pytest.mark.parametrize(
    ("name", "kind", "group"),
    first_kept(
        2,
        {
            "titans soup": ("titans", mc.Soup(), 16),
            "titans_depth1, every state kept": ("titans_depth1", mc.GRM(), 1),
            "titans": ("titans", mc.GRM(), 16),
        },
    ),
)
def test_tpu_equals_reference(monkeypatch, name, kind, group):
    memory = MEMORIES[name]
    inputs = make_inputs(memory, 12, batch=2, heads=1, dtype=np.float32)
    inputs["controls"]["log_alpha"][0, 5], inputs["key"][:, 2] = -20.0, 0.0

    def split(x):
        return jnp.asarray(x[:, :, 0].reshape(2, 3, 4, *x.shape[3:]))

    rows = tuple(inputs[name] for name in ("query", "key", "value", "controls"))
    rows = jax.tree.map(split, rows)
    weights = {name: jnp.asarray(weight[0]) for name, weight in inputs["weights"].items()}
    state = memory.init(weights, 4, 4, jnp.float32)
    states = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), state)
    sizes = {**_table.TABLE["chunk_update/pallas_tpu"]["default"], "group": group}
    monkeypatch.setitem(_table.TABLE, "chunk_update/pallas_tpu", {"default": sizes})
    run = functools.partial(written, memory, kind)
    with interpret_kernels():
        got = value_and_vjp(functools.partial(run, "pallas_tpu"), states, rows)
    wanted = value_and_vjp(functools.partial(run, "reference"), states, rows)
    assert_close(got[0], wanted[0], 1e-6)
    assert_close(got[1], wanted[1], 2e-6)


def of_heads(memory, dtype, batch, chunks, keys=8, rows=4):
    """First states in float32, and rows (b, h, ...) in the model's layout."""
    normal = normals(0)
    weights = {n: 0.5 * normal(*s) for n, s in memory.weight_shapes(keys, keys).items()}
    state = memory.init(jax.tree.map(jnp.asarray, weights), keys, keys, jnp.float32)
    states = jax.tree.map(lambda x: jnp.broadcast_to(x, (*batch, *x.shape)), state)
    tokens = [0.5 * normal(*batch, chunks, rows, keys) for _ in range(3)]
    controls = {name: -np.abs(normal(*batch, chunks, rows)) for name in memory.controls}
    controls["eta"] *= -0.1
    given = jax.tree.map(lambda x: jnp.asarray(x, dtype), (*tokens, controls))
    return jax.tree.map(lambda x: x.astype(jnp.float32), states), given


def carried(memory, implementation, states, given, inside=True, edges=None):
    """Titans through chunks whose kernels read heads inside; queries are late."""

    def chunk(state, given):
        query, key, value, controls = jax.tree.map(lambda x: x.astype(jnp.float32), given)
        end, view = memory.write(state, state, key, value, controls)
        return end, memory.read_online(view, query).astype(given[0].dtype)

    late = (True, *jax.tree.map(lambda x: False, given[1:])) if inside else None
    how: Any = dict(implementation=implementation, late=late, edges=edges)
    return chunk_update(chunk, states, given, batch_dims=given[0].ndim - 3, **how)


@pytest.mark.parametrize(
    ("depth", "dtype", "group"),
    first_kept(
        1,
        {
            "float32": (1, jnp.float32, 2),
            "bfloat16": (1, jnp.bfloat16, 1),
            "deep": (2, jnp.float32, 4),
        },
    ),
)
def test_tpu_with_heads_inside(monkeypatch, depth, dtype, group):
    memory = mc.memories.Titans(chunk_size=4, depth=depth, expansion=1)
    arrays = of_heads(memory, dtype, (1, 3), 4)
    sizes = {**_table.TABLE["chunk_update/pallas_tpu"]["default"], "group": group}
    monkeypatch.setitem(_table.TABLE, "chunk_update/pallas_tpu", {"default": sizes})
    with interpret_kernels():
        got = value_and_vjp(functools.partial(carried, memory, "pallas_tpu"), *arrays)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    wanted = value_and_vjp(functools.partial(carried, memory, "reference"), *wide)
    tolerance = 1e-2 if dtype == jnp.bfloat16 else 1e-6
    assert got[0][1].dtype == dtype
    assert_close(got[0], wanted[0], tolerance)
    assert_close(got[1], wanted[1], 2 * tolerance)


def at_rest(weights):
    return DeepState(weights, jax.tree.map(jnp.zeros_like, weights))


AT_REST = Edges(at_rest, lambda state: state.weights)
"""Weights alone are given and returned."""


def of_runs(memory, batch, chunks):
    """As ``of_heads``, with weights alone, which the runs of each row and head share."""
    states, given = of_heads(memory, jnp.float32, batch, chunks)
    return jax.tree.map(lambda x: x[:, :, :1], states.weights), given


@pytest.mark.parametrize(
    ("inside", "group"),
    first_kept(
        2,
        {
            "one group": (True, 2),
            "some groups": (True, 1),
            "units apart": (False, 2),
        },
    ),
)
def test_runs_that_share_what_they_begin_with(monkeypatch, inside, group):
    memory = mc.memories.Titans(chunk_size=4, depth=1)
    weights, given = of_runs(memory, (2, 2, 3), 2)
    weights = jax.tree.map(lambda x: x * jnp.arange(1.0, 3).reshape(2, 1, 1, 1, 1), weights)
    sizes = {**_table.TABLE["chunk_update/pallas_tpu"]["default"], "group": group}
    monkeypatch.setitem(_table.TABLE, "chunk_update/pallas_tpu", {"default": sizes})

    def both(implementation):
        run = functools.partial(carried, memory, implementation, inside=inside, edges=AT_REST)
        with interpret_kernels():
            return value_and_vjp(run, weights, given)

    got, wanted = both("pallas_tpu"), both("reference")
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, wanted)
    assert_close(got[0], wanted[0], 1e-6)
    assert_close(got[1], wanted[1], 2e-6)


@pytest.mark.slow
def test_no_races_with_heads_inside():
    memory = mc.memories.Titans(chunk_size=4, depth=1)
    run = functools.partial(carried, memory, "pallas_tpu", edges=AT_REST)
    arrays = of_runs(memory, (2, 2, 2), 2)
    assert not finds_races(functools.partial(value_and_vjp, run), *arrays)


@pytest.mark.usefixtures("x64")
def test_float32_where_integers_have_64_bits():
    state, rows = jnp.ones((2, 4, 4), jnp.float32), jnp.ones((2, 6, 3, 4), jnp.float32)

    def run(implementation, *arrays):
        return chunk_update(
            lambda s, r: (0.5 * s + jnp.matmul(r.T, r), jnp.matmul(r, s)),
            *arrays,
            batch_dims=1,
            implementation=implementation,
        )

    with interpret_kernels():
        got = value_and_vjp(functools.partial(run, "pallas_tpu"), state, rows)
    assert_close(got, value_and_vjp(functools.partial(run, "reference"), state, rows), 2e-6)


def traced(key_dim):
    """Titans by the TPU's kernels, not run."""
    memory = mc.memories.Titans(chunk_size=128)

    def shaped(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    arrays = [shaped(1, 512, 2, key_dim)] * 3
    controls = {name: shaped(1, 512, 2) for name in memory.controls}
    shapes = memory.weight_shapes(key_dim, key_dim)
    weights = {name: shaped(2, *shape) for name, shape in shapes.items()}

    def y(arrays, controls, weights):
        how = dict(memory=memory, aggregation=mc.Residual(), segmentation=mc.Constant(256))
        how |= dict(controls=controls, weights=weights, start="checkpoint")
        return mc.memory_caching(*arrays, **how, implementation="pallas_tpu").sum()

    return jax.eval_shape(jax.grad(y), arrays, controls, weights)


@pytest.mark.parametrize("key_dim", first_kept(2, [256, 96, 32, 64, 128]))
def test_tpu_takes_heads_of_any_usual_size(key_dim):
    assert {x.shape for x in traced(key_dim)} == {(1, 512, 2, key_dim)}


def test_tpu_refuses_what_vector_memory_cannot_hold():
    with pytest.raises(NotImplementedError, match=r"backward [0-9.]+ MiB, where kernels may use"):
        traced(512)


def test_chunks_without_a_state_are_side_by_side_on_a_gpu():
    rows = jnp.arange(24.0).reshape(2, 3, 4)

    def run(implementation, rows):
        return chunk_update(
            lambda _, x: ((), jnp.sin(x).sum()),
            (),
            rows,
            batch_dims=1,
            implementation=implementation,
        )

    got = value_and_vjp(functools.partial(run, "pallas_gpu"), rows)
    assert_close(got, value_and_vjp(functools.partial(run, "reference"), rows), 1e-6)


def test_gpu_serves_no_other_state():
    with pytest.raises(NotImplementedError, match="neither deep nor an affine map"):
        chunk_update(
            lambda s, r: (s, r), jnp.ones(2), jnp.ones(3), batch_dims=0, implementation="pallas_gpu"
        )
