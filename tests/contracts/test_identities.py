"""Identities that hold for every memory: chunks, schedules, checkpoints, decays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from tests.cases import (
    FAMILIES,
    MEMORIES,
    STARTS,
    TWO_PLANS,
    assert_close,
    combine,
    make_inputs,
    run,
    run_all,
    run_reference,
    scheduled,
    value_and_vjp,
)
from tests.covers import kept_of, rules

DECAYS = {"log_alpha", "log_beta", "log_w"}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("start", kept_of(STARTS, "checkpoint"))
def test_chunks_of_one_token_equal_tokens(start):
    memory = mc.memories.Titans(chunk_size=1, expansion=2)
    inputs = make_inputs(memory, 21)
    inputs["controls"]["eta"] *= 0.1  # a larger one diverges
    wanted = run_reference(inputs, memory, mc.GRM(), start=start)
    assert_close(run(inputs, memory, mc.GRM(), start=start), wanted, 1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("start", kept_of(STARTS, "independent"))
def test_schedules_agree(start):
    inputs = make_inputs(MEMORIES["titans"], 21)

    def outputs(schedule):
        with scheduled(schedule):  # the backward pass is traced out here
            return value_and_vjp(
                lambda i: run(i, MEMORIES["titans"], mc.GRM(), start=start, schedule=schedule),
                inputs,
            )

    wanted = outputs("in_turn")
    for other in ("side_by_side", None):
        assert_close(outputs(other), wanted, 1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("memory", kept_of(FAMILIES, "gated_deltanet", fast=["linear"]))
def test_checkpoint_carries_on_across_segments(memory):
    inputs = make_inputs(memory, 21, batch=1, heads=1)
    query, key, value = (inputs[name][0, :, 0] for name in ("query", "key", "value"))
    weights = {name: jnp.asarray(weight[0]) for name, weight in inputs["weights"].items()}
    state = anchor = memory.init(weights, 4, 4, key.dtype)
    live, step, read = [], jax.jit(memory.step), jax.jit(memory.read)
    for t in range(21):  # one run over the whole sequence, blind to segments
        anchor = state if t % (memory.gradient_chunk or 1) == 0 else anchor
        controls = {
            name: control[0] if control.ndim == 1 else control[0, t, 0]
            for name, control in inputs["controls"].items()
        }
        state = step(state, anchor, key[t], value[t], controls)
        live.append(memory.matrices(state))
    wanted = [
        sum(
            np.asarray(read(state, query[t : t + 1])[0])
            for state in (*live[7 : t // 8 * 8 : 8], live[t])
        )
        for t in range(21)
    ]
    y = run(inputs, memory, mc.Residual(), size=8, start="checkpoint")
    assert_close(y[0, :, 0], np.stack(wanted), 1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name", rules(4, among=[n for n in MEMORIES if DECAYS & set(MEMORIES[n].controls)])
)
def test_a_decay_of_zero_forgets_and_touches_nothing_before(name):
    memory = MEMORIES[name]
    inputs = make_inputs(memory, 21)
    for control in DECAYS & set(inputs["controls"]):
        inputs["controls"][control][:, 5] = -np.inf
    with scheduled("in_turn"):
        y, gradients = value_and_vjp(lambda inputs: run(inputs, memory, mc.GRM()), inputs)
    assert_close(y, run_reference(inputs, memory, mc.GRM()), 1e-12)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


@pytest.mark.parametrize("name", rules(0))
def test_extreme_controls_stay_finite(name):
    finite_at_extremes(name, 20)


@pytest.mark.parametrize("name", kept_of([*FAMILIES], "titans"))
def test_extreme_controls_of_one_token_stay_finite(name):
    finite_at_extremes(name, 1)


def finite_at_extremes(name, length):
    inputs = make_inputs(MEMORIES[name], length)
    inputs["key"] *= 0
    extremes = {"log_alpha": -20.0, "log_w": -20.0, "log_gamma": -20.0, "eta": 0.0}
    for control, extreme in extremes.items():
        if control in inputs["controls"]:
            inputs["controls"][control][:] = extreme

    def outputs(inputs):
        return run_all(inputs, MEMORIES[name], cases=combine(["ssc"], TWO_PLANS[1:]))

    with scheduled("in_turn"):
        results = value_and_vjp(outputs, inputs)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(results))
