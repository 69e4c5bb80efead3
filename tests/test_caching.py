"""What must hold for every memory, aggregation and start: see the names of the tests."""

import pathlib
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

import memcache_jax as mc
from tests.cases import (
    AGGREGATIONS,
    MEMORIES,
    STARTS,
    assert_close,
    make_inputs,
    run,
    run_reference,
)

VECTORS = np.load(pathlib.Path(__file__).parent / "data" / "memory_caching.npz")

every_memory = pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
every_aggregation = pytest.mark.parametrize("aggregation", AGGREGATIONS.values(), ids=AGGREGATIONS)
every_start = pytest.mark.parametrize("start", STARTS)


class TestVectors:
    """Independent token-by-token results in float64."""

    RULES: ClassVar = {
        "linear": (mc.memories.LinearAttention(), ()),
        "titans": (mc.memories.Titans(chunk_size=2, expansion=2), ("W2", "W1")),
        "titans_depth1": (mc.memories.Titans(chunk_size=2, depth=1), ("W",)),
    }

    @pytest.mark.usefixtures("x64")
    @pytest.mark.parametrize("implementation", ["xla", "reference"])
    @every_start
    @pytest.mark.parametrize("variant", AGGREGATIONS)
    @pytest.mark.parametrize("rule", RULES)
    def test_agrees(self, rule, variant, start, implementation):
        memory, weights = self.RULES[rule]
        given = {
            name: jnp.asarray(VECTORS[f"in/{name}"]) for name in ("q", "k", "v", "u", *weights)
        }
        log_alpha, log_beta, eta = (
            transform(jnp.asarray(VECTORS[f"in/{name}"]))[None, :, None]
            for name, transform in (("alpha", jnp.log), ("beta", jnp.log), ("eta", jnp.asarray))
        )
        controls = dict(log_alpha=log_alpha, log_beta=log_beta, eta=eta)
        y = mc.memory_caching(
            *(given[name][None, :, None] for name in "qkvu"),
            memory=memory,
            controls={name: controls[name] for name in memory.controls},
            weights={name: given[name][None] for name in weights},
            aggregation=AGGREGATIONS[variant],
            segmentation=mc.Constant(4),
            start=start,
            implementation=implementation,
        )
        wanted = VECTORS[f"out/{rule}/{variant}/constant/{start}"]
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y[0, :, 0], wanted, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("length", [1, 21])
@every_start
@every_aggregation
@every_memory
def test_chunks_equal_tokens(memory, aggregation, start, length):
    inputs = make_inputs(memory, length)
    wanted = run_reference(inputs, memory, aggregation, start=start)
    assert_close(run(inputs, memory, aggregation, start=start), wanted, 1e-12)


@pytest.mark.usefixtures("x64")
@every_start
def test_chunks_of_one_token_equal_tokens(start):
    memory = mc.memories.Titans(chunk_size=1, expansion=2)
    inputs = make_inputs(memory, 21)
    inputs["controls"]["eta"] *= 0.1  # a larger one diverges
    wanted = run_reference(inputs, memory, mc.GRM(), start=start)
    assert_close(run(inputs, memory, mc.GRM(), start=start), wanted, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMORIES)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_chunks_equal_tokens_at_any_shape(name, data):
    memory = MEMORIES[name]
    chunk = data.draw(st.integers(1, 5), "chunk")
    if memory.gradient_chunk:
        memory = mc.memories.Titans(chunk, expansion=1, depth=memory.depth)
    size = chunk * data.draw(st.integers(1, 4), "chunks in a segment")
    length = data.draw(st.integers(1, 40), "length")
    sizes = {name: data.draw(st.integers(1, 3), name) for name in ("batch", "heads", "dim")}
    start = data.draw(st.sampled_from(STARTS), "start")
    aggregation = data.draw(st.sampled_from(list(AGGREGATIONS.values())), "aggregation")
    with jax.enable_x64(True):
        inputs = make_inputs(memory, length, **sizes)
        got = run(inputs, memory, aggregation, size=size, start=start)
        wanted = run_reference(inputs, memory, aggregation, size=size, start=start)
        assert_close(got, wanted, 1e-11, scale=1.0)


@pytest.mark.usefixtures("x64")
@every_start
@every_aggregation
@every_memory
def test_gradients_equal_the_references(memory, aggregation, start):
    inputs = make_inputs(memory, 21, batch=1, heads=2)
    mask = jax.random.normal(jax.random.key(9), (1, 21, 2, 4))

    def gradients(run, **options):
        def loss(inputs):
            return jnp.sum(mask * run(inputs, memory, aggregation, start=start, **options))

        return jax.jit(jax.grad(loss))(inputs)

    assert_close(gradients(run), gradients(run_reference), 1e-8, scale=1.0)


@pytest.mark.usefixtures("x64")
@every_start
def test_schedules_agree(start):
    inputs = make_inputs(MEMORIES["titans"], 21)

    def outputs(schedule):
        y, pull = jax.vjp(
            lambda i: run(i, MEMORIES["titans"], mc.GRM(), start=start, schedule=schedule), inputs
        )
        return y, pull(jnp.cos(y))

    assert_close(outputs("side_by_side"), outputs("in_turn"), 1e-12)


@pytest.mark.usefixtures("x64")
@every_start
@every_memory
def test_gradients_equal_finite_differences(memory, start):
    inputs = make_inputs(memory, 11, batch=1, heads=1)
    check_grads(
        lambda inputs: run(inputs, memory, mc.GRM(), size=4, start=start),
        (inputs,),
        order=1,
        modes=["rev"],
        atol=1e-6,
        rtol=1e-6,
    )


@pytest.mark.usefixtures("x64")
@every_start
@every_aggregation
@every_memory
def test_no_output_sees_a_later_token(memory, aggregation, start):
    inputs = make_inputs(memory, 21)
    tokens = {name: x for name, x in inputs.items() if name != "weights"}
    later = make_inputs(memory, 21, seed=1)
    for t in (0, 7, 8, 13, 19):
        mixed = jax.tree.map(
            lambda x, y, t=t: x.at[:, t + 1 :].set(y[:, t + 1 :]),
            tokens,
            {name: later[name] for name in tokens},
        )
        got = run(mixed | {"weights": inputs["weights"]}, memory, aggregation, start=start)
        wanted = run(inputs, memory, aggregation, start=start)
        np.testing.assert_array_equal(got[:, : t + 1], wanted[:, : t + 1])
        assert not np.allclose(got[:, t + 1], wanted[:, t + 1])


@pytest.mark.usefixtures("x64")
@every_start
@every_memory
def test_outputs_do_not_depend_on_the_length(memory, start):
    inputs = make_inputs(memory, 21)
    whole = run(inputs, memory, mc.GRM(), start=start)
    for length in (1, 5, 8, 9):
        prefix = {
            name: value if name == "weights" else jax.tree.map(lambda x, n=length: x[:, :n], value)
            for name, value in inputs.items()
        }
        assert_close(run(prefix, memory, mc.GRM(), start=start), whole[:, :length], 1e-12)


@pytest.mark.usefixtures("x64")
def test_residual_of_linear_attention_is_linear_attention():
    memory = MEMORIES["linear"]
    inputs = make_inputs(memory, 21)
    scores = jnp.einsum("bthk,bshk->bhts", inputs["query"], inputs["key"])
    wanted = jnp.einsum("bhts,bshv->bthv", jnp.tril(scores), inputs["value"])
    assert_close(run(inputs, memory, mc.Residual()), wanted, 1e-12)


@pytest.mark.usefixtures("x64")
@every_start
@every_memory
def test_one_segment_is_the_base_rule(memory, start):
    inputs = make_inputs(memory, 21)
    outputs = [
        run(inputs, memory, aggregation, size=size, start=start)
        for aggregation in AGGREGATIONS.values()
        for size in (24, 64)
    ]
    base = run_reference(inputs, memory, mc.Residual(), size=24)
    for y in outputs:
        assert_close(y, base, 1e-12)


@pytest.mark.usefixtures("x64")
@every_memory
def test_checkpoint_carries_on_across_segments(memory):
    inputs = make_inputs(memory, 21, batch=1, heads=1)
    query, key, value = (inputs[name][0, :, 0] for name in ("query", "key", "value"))
    weights = {name: weight[0] for name, weight in inputs["weights"].items()}
    state = anchor = memory.init(weights, 4, 4, key.dtype)
    live = []
    for t in range(21):  # one run over the whole sequence, blind to segments
        anchor = state if t % (memory.gradient_chunk or 1) == 0 else anchor
        controls = {name: control[0, t, 0] for name, control in inputs["controls"].items()}
        state = memory.step(state, anchor, key[t], value[t], controls)
        live.append(memory.matrices(state))
    wanted = [
        sum(
            memory.read(state, query[t : t + 1])[0]
            for state in (*live[7 : t // 8 * 8 : 8], live[t])
        )
        for t in range(21)
    ]
    y = run(inputs, memory, mc.Residual(), size=8, start="checkpoint")
    assert_close(y[0, :, 0], jnp.stack(wanted), 1e-12)


@pytest.mark.usefixtures("x64")
@every_memory
def test_a_decay_of_zero_forgets_and_touches_nothing_before(memory):
    inputs = make_inputs(memory, 21)
    for name in {"log_alpha", "log_beta"} & set(inputs["controls"]):
        inputs["controls"][name] = inputs["controls"][name].at[:, 5].set(-jnp.inf)
    wanted = run_reference(inputs, memory, mc.GRM())
    assert_close(run(inputs, memory, mc.GRM()), wanted, 1e-12)
    gradient = jax.grad(lambda inputs: jnp.sum(run(inputs, memory, mc.GRM()) ** 2))(inputs)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(gradient))


def test_memory_does_not_grow_with_the_square_of_an_odd_length():
    memory = MEMORIES["linear"]

    def temporaries(length):
        inputs = make_inputs(memory, length)
        compiled = run.lower(inputs, memory, mc.GRM(), size=4096).compile()
        analysis: Any = compiled.memory_analysis()
        return analysis.temp_size_in_bytes

    assert temporaries(1021) < 1.5 * temporaries(1024)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
@every_start
@every_memory
def test_lower_precision_stays_close(memory, start, dtype, tolerance):
    inputs = jax.tree.map(
        lambda x: x.astype(dtype), make_inputs(memory, 200, dim=16, dtype=jnp.float32)
    )
    got = run(inputs, memory, mc.GRM(), size=64, start=start)
    assert got.dtype == dtype
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: x.astype(jnp.float64), inputs)
        wanted = run(exact, memory, mc.GRM(), size=64, start=start)
        assert_close(got.astype(jnp.float64), wanted, tolerance)


@every_start
@every_aggregation
def test_extreme_controls_stay_finite(aggregation, start):
    memory = mc.memories.Titans(chunk_size=4, expansion=2)
    for length in (1, 20):
        inputs = make_inputs(memory, length)
        inputs["key"] = jnp.zeros_like(inputs["key"])
        inputs["controls"]["log_alpha"] = jnp.full_like(inputs["controls"]["log_alpha"], -20.0)
        inputs["controls"]["eta"] = jnp.zeros_like(inputs["controls"]["eta"])
        value, gradient = jax.value_and_grad(
            lambda inputs: jnp.sum(run(inputs, memory, aggregation, start=start) ** 2)
        )(inputs)
        assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((value, gradient)))


def test_works_under_other_transformations():
    memory = MEMORIES["titans"]
    inputs = make_inputs(memory, 21)
    plain = run(inputs, memory, mc.GRM())

    def loss(inputs):
        return jnp.sum(run(inputs, memory, mc.GRM()) ** 2)

    stacked = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), inputs)
    assert_close(jax.vmap(lambda inputs: run(inputs, memory, mc.GRM()))(stacked)[0], plain, 1e-5)
    wanted = jax.grad(loss)(inputs)
    assert_close(jax.grad(jax.checkpoint(loss))(inputs), wanted, 1e-4)
    assert_close(jax.vmap(jax.grad(loss))(stacked)["query"][0], wanted["query"], 1e-4)
    total, _ = jax.lax.scan(lambda sum_, x: (sum_ + loss(x), None), 0.0, stacked)
    assert_close(total, loss(inputs) + loss(jax.tree.map(lambda x: 0.5 * x, inputs)), 1e-5)


def test_schedule_follows_the_platform_lowered_for():
    memory = MEMORIES["titans"]
    traced = jax.jit(lambda inputs: run(inputs, memory, mc.Residual(), size=64)).trace(
        make_inputs(memory, 64)
    )
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
            (dict(key=jnp.ones((2, 0, 3, 4))), "nothing is to be read"),
            (dict(key=jnp.ones((0, 21, 3, 4))), "nothing is to be read"),
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
        with pytest.raises(ValueError, match="gate='loud'"):
            mc.GRM(gate="loud")
        with pytest.raises(ValueError, match="depth=3"):
            mc.memories.Titans(depth=3)
        with pytest.raises(ValueError, match="chunk_size=0"):
            mc.memories.Titans(chunk_size=0)
