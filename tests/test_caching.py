"""What must hold for every memory, aggregation and start: see the names of the tests."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from tests.cases import (
    FAMILIES,
    MEMORIES,
    PLANS,
    REFERENCE,
    STARTS,
    TWO_PLANS,
    assert_close,
    combine,
    each_once,
    make_inputs,
    run,
    run_all,
    run_reference,
    scheduled,
    value_and_vjp,
)
from tests.vectors import RULES, assert_agrees, vector_inputs

DECAYS = {"log_alpha", "log_beta", "log_w"}
every_memory = pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
every_family = pytest.mark.parametrize("memory", FAMILIES.values(), ids=FAMILIES)
every_start = pytest.mark.parametrize("start", STARTS)


@pytest.mark.usefixtures("x64")
class TestVectors:
    """Outputs of every rule and combination against tests/vectors.py, to 1e-10."""

    @pytest.mark.parametrize("rule", RULES)
    def test_agrees_and_sees_no_later_token(self, rule):
        memory, inputs = vector_inputs(rule)
        outputs = run_all(inputs, memory)
        assert len(outputs) == 16
        for name, y in outputs.items():
            assert y.dtype == jnp.float64
            assert_agrees(rule, name, y)
        sees_no_later_token(memory, inputs, outputs)
        for plan in PLANS:
            soup, grm = (outputs["/".join((kind, *plan))] for kind in ("soup", "grm"))
            first = 22 if memory.depth == 1 else 4
            assert_close(soup[:, :first], grm[:, :first], 1e-12)
            assert first == 22 or np.abs(soup[:, first:] - grm[:, first:]).max() > 1e-3

    @pytest.mark.parametrize("rule", RULES)
    def test_a_prefix_agrees(self, rule):
        memory, inputs = vector_inputs(rule)
        shift = list(RULES).index(rule)
        for length, cases in (13, each_once(shift)), (1, each_once(shift + 2)[:1]):
            prefix = over_time(lambda x, t=length: x[:, :t], inputs, memory)
            for name, y in run_all(prefix, memory, cases=cases).items():
                assert_agrees(rule, name, y)

    @pytest.mark.parametrize("rule", RULES)
    def test_reference_agrees(self, rule):
        memory, inputs = vector_inputs(rule)
        cases = combine(["ssc" if memory.depth == 1 else "soup"])
        for name, y in run_all(inputs, memory, cases=cases, options=REFERENCE).items():
            assert_agrees(rule, name, y)


def sees_no_later_token(memory, inputs, outputs):
    """Other tokens after one change all outputs after it, and none before."""
    for t in (3, 9):
        changed = over_time(lambda x, t=t: changed_after(x, t), inputs, memory)
        for name, y in run_all(changed, memory).items():
            np.testing.assert_array_equal(y[:, : t + 1], outputs[name][:, : t + 1], name)
            assert not np.allclose(y[:, t + 1], outputs[name][:, t + 1]), name


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", sorted(MEMORIES.keys() - RULES.keys()))
def test_others_agree_with_the_reference_and_see_no_later_token(name):
    """Rules of which there are no outputs by other code."""
    memory = MEMORIES[name]
    inputs = make_inputs(memory, 22, batch=1, heads=1)
    outputs = run_all(inputs, memory)
    for name, y in run_all(inputs, memory, cases=each_once(0), options=REFERENCE).items():
        assert_close(outputs[name], y, 1e-12)
    sees_no_later_token(memory, inputs, outputs)
    for length, cases in (13, each_once(1)), (1, each_once(2)[:1]):
        prefix = over_time(lambda x, t=length: x[:, :t], inputs, memory)
        for name, y in run_all(prefix, memory, cases=cases).items():
            assert_close(y, outputs[name][:, :length], 1e-12)


def over_time(change, inputs, memory):
    """Inputs whose arrays over time are changed."""
    fixed = {name for name, control in memory.controls.items() if control.axes == "h"}

    def leaf(path, x):
        return x if path[0].key == "weights" or path[-1].key in fixed else change(x)

    return jax.tree_util.tree_map_with_path(leaf, inputs)


def changed_after(x, t):
    """The same up to token t; later tokens in reverse order."""
    return np.concatenate([x[:, : t + 1], x[:, :t:-1]], axis=1)


@pytest.mark.usefixtures("x64")
@every_start
def test_chunks_of_one_token_equal_tokens(start):
    memory = mc.memories.Titans(chunk_size=1, expansion=2)
    inputs = make_inputs(memory, 21)
    inputs["controls"]["eta"] *= 0.1  # a larger one diverges
    wanted = run_reference(inputs, memory, mc.GRM(), start=start)
    assert_close(run(inputs, memory, mc.GRM(), start=start), wanted, 1e-12)


@pytest.mark.usefixtures("x64")
@every_start
def test_schedules_agree(start):
    inputs = make_inputs(MEMORIES["titans"], 21)

    def outputs(schedule):
        with scheduled(schedule):  # the backward pass is traced out here
            return value_and_vjp(
                lambda i: run(i, MEMORIES["titans"], mc.GRM(), start=start, schedule=schedule),
                inputs,
            )

    assert_close(outputs("side_by_side"), outputs("in_turn"), 1e-12)


@pytest.mark.parametrize("kind", [mc.SSC(top_k=2), mc.SSC(top_k=2, inner="soup")], ids=repr)
def test_the_cost_of_a_routed_read_does_not_grow_with_the_segments(kind):
    from experiments._flops import count_flops

    memory = MEMORIES["titans"]

    def flops_per_token(segments):
        inputs = make_inputs(memory, 256 * segments, batch=1, heads=1)
        total = count_flops(lambda i: run(i, memory, kind, size=256), inputs)
        return total / (256 * segments)

    relevance = 2 * 4 * 16  # of 16 more segments to a token: the router's own cost
    assert flops_per_token(32) - flops_per_token(16) <= 1.1 * relevance


@pytest.mark.usefixtures("x64")
@every_family
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
@pytest.mark.parametrize("name", [n for n in MEMORIES if DECAYS & set(MEMORIES[n].controls)])
def test_a_decay_of_zero_forgets_and_touches_nothing_before(name):
    memory = MEMORIES[name]
    inputs = make_inputs(memory, 21)
    for control in DECAYS & set(inputs["controls"]):
        inputs["controls"][control][:, 5] = -np.inf
    with scheduled("in_turn"):
        y, gradients = value_and_vjp(lambda inputs: run(inputs, memory, mc.GRM()), inputs)
    assert_close(y, run_reference(inputs, memory, mc.GRM()), 1e-12)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_memory_does_not_grow_with_the_square_of_an_odd_length():
    memory = MEMORIES["linear"]

    def temporaries(length):
        inputs = make_inputs(memory, length)
        compiled = run.lower(inputs, memory, mc.GRM(), size=4096).compile()
        analysis: Any = compiled.memory_analysis()
        return analysis.temp_size_in_bytes

    assert temporaries(1021) < 1.5 * temporaries(1024)


@pytest.mark.parametrize(("name", "length"), list(itertools.product(MEMORIES, (20, 1))))
def test_extreme_controls_stay_finite(name, length):
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
            (dict(query=jnp.ones((2, 20, 3, 4))), r"query must have shape .*\(2, 21, 3, 4\), got"),
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
            with pytest.raises(ValueError, match=f"at least 1 token, got .*size={size}"):
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
        with pytest.raises(ValueError, match="chunk_size=0"):
            mc.memories.Titans(chunk_size=0)
