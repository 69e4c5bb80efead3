"""Blocks written in turn, all at once, and as maps: equality, and the precision of products."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.engine.types import Rows, Writing
from memcache_jax.engine.write import (
    transitions,
    write_at_once,
    write_blocks,
    write_in_turn,
)
from memcache_jax.kernels._dispatch import interpret_kernels
from tests.cases import MEMORIES, assert_close, make_inputs, value_and_vjp
from tests.covers import first_kept, kept_of, rules
from tests.engine.test_affine import AFFINE, initial_of, kernels_of, make_rows

ALL, HIGHEST = np.array([True, True]), "(Precision.HIGHEST, Precision.HIGHEST)"


def precisions(function, rows):
    """Those of all matrix products in a function and its gradient, where the default is another."""

    def total(rows):
        return sum(jnp.sum(x) for x in jax.tree.leaves(function(rows)))

    with jax.default_matmul_precision("bfloat16"):
        text = str(jax.make_jaxpr(jax.grad(total))(rows))
    return set(re.findall(r"precision=(None|\(.*?\))", text))


def test_tpu_kernels_of_deep_memories_read_tokens_as_they_come():
    memory, dim, shape = mc.memories.Titans(chunk_size=16, expansion=1), 8, (1, 64, 3)
    tokens = jax.ShapeDtypeStruct((*shape, dim), jnp.bfloat16)
    controls = dict.fromkeys(memory.controls, jax.ShapeDtypeStruct(shape, jnp.bfloat16))
    weights = dict.fromkeys(("W1", "W2"), jax.ShapeDtypeStruct((3, dim, dim), jnp.float32))

    def both(query, key, value, controls, weights):
        def run(*tokens):
            return mc.memory_caching(
                *tokens,
                controls=controls,
                weights=weights,
                memory=memory,
                aggregation=mc.Residual(),
                segmentation=mc.Constant(64),
                implementation="pallas_tpu",
            )

        y, pull = jax.vjp(run, query, key, value)
        return pull(y)

    with interpret_kernels():
        program = jax.make_jaxpr(both)(tokens, tokens, tokens, controls, weights)
    for call, number in zip(kernels_of(program.jaxpr), (4, 7), strict=True):
        arrays = [x.aval for x in (*call.invars, *call.outvars)]
        of_tokens = [x for x in arrays if x.shape == (1, 4, 16, 3, dim)]
        assert len(of_tokens) == number  # q, k, v, y; q, k, v, dy and three gradients
        assert {x.dtype for x in of_tokens} == {jnp.dtype("bfloat16")}
        states = [x for x in arrays if x.dtype == jnp.float32]
        assert {x.shape[-2:] for x in states} == {(dim, dim)}


@pytest.mark.parametrize("documents", first_kept(1, [True, False]))
def test_kernels_of_deep_memories_keep_spoilt_tokens_apart(documents):
    """Outputs and gradients are those of clean rows with NaN put in afterwards."""
    memory = MEMORIES["titans_depth1"]
    inputs = make_inputs(memory, 22, heads=2, dtype=np.float32)
    del inputs["connector"]
    inputs["value"][0, 5, 0, 1], inputs["key"][1, 13, 1, 2] = np.nan, np.inf
    inputs["controls"]["eta"][1, 2, 0] = np.nan
    ids = jnp.repeat(jnp.array([0, 1, 2]), np.array([9, 5, 8]))[None].repeat(2, axis=0)
    how: Any = dict(memory=memory, aggregation=mc.Residual(), segmentation=mc.Constant(8))
    how["document_ids"] = ids if documents else None

    @functools.partial(jax.jit, static_argnums=0)
    def both(implementation, inputs):
        y, pull = jax.vjp(
            lambda inputs: mc.memory_caching(**inputs, **how, implementation=implementation), inputs
        )
        return y, pull(jnp.where(jnp.isnan(y), 0, jnp.cos(y)))

    with interpret_kernels():
        got = both("pallas_tpu", inputs)
    wanted = both("xla", inputs)
    jax.tree.map(
        np.testing.assert_array_equal, *(jax.tree.map(jnp.isnan, x) for x in (got, wanted))
    )
    got, wanted = jax.tree.map(jnp.nan_to_num, (got, wanted))
    assert_close(got[0], wanted[0], 1e-6)
    assert_close(got[1], wanted[1], 2e-6)


@pytest.mark.parametrize("memory", rules(1, "gated_deltanet", among=AFFINE, values=True))
def test_all_chunks_at_once_are_chunks_in_turn(memory):
    """Of blocks of two chunks; the second and the last go on from the one before."""
    rows = jax.tree.map(lambda x: x.reshape(2, 1, 4, 2, 4, *x.shape[4:]), make_rows(memory, 4))
    how = Writing(memory, ("reads",), initial_of(memory), None)

    def run(write):
        def written(*rows):
            return write(how, Rows(*rows), np.array([True, False, True, False]))

        return value_and_vjp(written, *rows)

    got, wanted = run(write_at_once), run(write_in_turn)
    assert_close(got[0], wanted[0], 1e-6)
    assert_close(got[1], wanted[1], 2e-6)


@pytest.mark.parametrize(
    "name", kept_of(["deltanet", "rwkv7", "kda", "gdn2"], "rwkv7", fast=["kda"])
)
def test_maps_are_made_and_composed_at_the_highest_precision(name):
    memory = MEMORIES[name]
    rows = Rows(*jax.tree.map(lambda x: x[:, :, :, None], make_rows(memory, 2)))
    how = Writing(memory, (), initial_of(memory), None)

    def composed(rows):
        runs, _ = write_blocks(how.with_maps(), rows, ALL)
        first = jax.tree.map(lambda x: x[:, :, 0], runs)
        then = jax.tree.map(lambda x: x[:, :, 1], runs)
        return jax.vmap(jax.vmap(memory.compose))(first, then)

    assert precisions(composed, rows) == {HIGHEST}
    assert precisions(lambda rows: transitions(how, rows, ALL), rows) == {HIGHEST}
    # What is written without a map has the precision that the context asks for.
    assert precisions(lambda rows: write_blocks(how, rows, ALL)[0], rows) > {HIGHEST}
