"""Runs of affine memories as maps of the state before them, which compose."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.memories.base import Run
from tests.cases import MEMORIES, assert_close, one_head, with_slow
from tests.covers import rules

AFFINE = {name: memory for name, memory in MEMORIES.items() if memory.form == "affine"}
every_rule = pytest.mark.parametrize("memory", with_slow(AFFINE, "gated_deltanet"))
STRENGTHS = (0.0, -1e-4, -1e-2, -1.0, -30.0, -200.0, -np.inf)


def run_of(memory, state, key, value, controls):
    """The run that one chunk is."""
    end, _ = memory.write(state, state, key, value, controls)
    identity = memory.identity(key.shape[-1], key.dtype)
    return Run(end, memory.extended(identity, key, value, controls))


def cut(tokens, begin, end):
    return jax.tree.map(lambda x: x[begin:end], tokens)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("memory", rules(2, "gated_deltanet", among=AFFINE, values=True))
def test_runs_compose_in_any_order(memory):
    initial, *tokens, _ = one_head(memory, 14)
    runs = functools.partial(run_of, memory, initial)

    @jax.jit
    def both():
        first, then, last = (
            runs(*cut(tokens, begin, end)) for begin, end in ((0, 5), (5, 6), (6, 14))
        )
        before, _ = memory.write(initial, initial, *cut(tokens, 3, 9))
        after, _ = memory.write(before, before, *tokens)
        compose = memory.compose
        return (
            runs(*tokens),
            after,
            [
                compose(compose(first, then), last),
                compose(first, compose(then, last)),
                compose(memory_before(memory, first), compose(then, last)),
            ],
            compose(Run(before, None), runs(*tokens)).state,
        )

    whole, after, composed, followed = both()
    for run in composed:
        assert_close(run, whole, 1e-13, scale=1.0)
    assert_close(followed, after, 1e-13, scale=1.0)


def memory_before(memory, run):
    """The run after one of no tokens."""
    identity = memory.identity(run.state.matrix.shape[0], run.state.matrix.dtype)
    nothing = jax.tree.map(jnp.zeros_like, run.state)
    return memory.compose(Run(nothing, identity), run)


@pytest.mark.usefixtures("x64")
@every_rule
def test_a_diagonal_is_a_vector(memory):
    transition = memory.identity(5, jnp.float64)
    matrix = jax.tree.leaves(transition)[0]
    assert matrix.shape == ((5, 5) if memory.erases else (5,))


SEGMENTS, LENGTH = 4096, 4


@pytest.mark.parametrize("memory", rules(3, among=AFFINE, values=True))
def test_long_compositions_are_as_exact_as_writing_in_turn(memory):
    initial, *tokens, _ = one_head(memory, SEGMENTS * LENGTH, dim=8, dtype=np.float32)
    rng = np.random.default_rng(0)
    controls = tokens[2]
    for name, x in controls.items():
        if name.startswith("log_"):
            share = [0.3, 0.3, 0.3, 0.07, 0.01, 0.01, 0.01]
            controls[name] = jnp.asarray(rng.choice(STRENGTHS, x.shape, p=share), x.dtype)
        if name == "beta":
            controls[name] = jnp.asarray(rng.uniform(0, 2, x.shape), x.dtype)
    segments = jax.tree.map(lambda x: x.reshape(SEGMENTS, LENGTH, *x.shape[1:]), tokens)

    @jax.jit
    def in_turn(initial, segments):
        def write(state, tokens):
            state, _ = memory.write(state, state, *tokens)
            return state, state.matrix

        return jax.lax.scan(write, initial, segments)[1]

    @jax.jit
    def composed(initial, segments):
        runs = jax.vmap(lambda tokens: run_of(memory, initial, *tokens))(segments)
        return jax.lax.associative_scan(jax.vmap(memory.compose), runs).state.matrix

    with jax.enable_x64(True):
        exact = in_turn(*jax.tree.map(lambda x: x.astype(np.float64), (initial, segments)))

    def error(matrices):
        return np.abs(np.asarray(matrices, np.float64) - np.asarray(exact)).max()

    assert error(composed(initial, segments)) <= 4 * error(in_turn(initial, segments))


def test_a_rule_that_carries_more_composes_only_if_it_says_how():
    class Carries(mc.memories.AffineMemory):
        def carried(self, key, value):
            return super().carried(key, value)

    class Says(Carries):
        def compose(self, first, then):
            return super().compose(first, then)

        merges = True

    assert (Carries.merges, Says.merges, mc.memories.SWLA.merges) == (False, True, True)
