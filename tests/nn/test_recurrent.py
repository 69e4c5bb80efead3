"""Layers composed of parts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from memcache_jax.nn import recurrent
from tests.cases import assert_close
from tests.covers import kept_of

CONV: dict[str, Any] = dict(conv_width=3, conv_bias=True)
SHIFTED = recurrent.Path(2, 4, shift=True)
MIXERS = {
    "gated delta, grouped": recurrent.RecurrentMixer(
        mc.memories.GatedDeltaNet(),
        query=recurrent.Path(2, 6, norm="l2", scale=0.5, **CONV),
        key=recurrent.Path(2, 6, norm="l2", **CONV),
        value=recurrent.Path(4, 5, **CONV),
        coefficients=(recurrent.TimeStepDecay(), recurrent.Rate(scale=2.0)),
    ),
    "state space": recurrent.RecurrentMixer(
        mc.memories.SSD(),
        query=recurrent.Path(1, 6, **CONV),
        key=recurrent.Path(1, 6, **CONV),
        value=recurrent.Path(4, 4, **CONV),
        coefficients=(recurrent.TimeStep(0.001, 0.5),),
        output=recurrent.Output(2, shared_scale=False, gate_first=True),
        skip=True,
    ),
    "channel decays": recurrent.RecurrentMixer(
        mc.memories.GLA(),
        query=recurrent.Path(2, 4, activation="elu", norm="sum"),
        key=recurrent.Path(2, 4, activation="relu"),
        value=recurrent.Path(2, 4, use_bias=True),
        coefficients=(recurrent.LowRankDecay(recurrent.LowRank(3), 8.0, -0.4),),
        output=recurrent.Output(None, gate="sigmoid", use_bias=True),
    ),
    "retention": recurrent.RecurrentMixer(
        mc.memories.RetNet(),
        query=recurrent.Path(2, 4, rope_base=100.0),
        key=recurrent.Path(2, 4, rope_base=100.0),
        value=recurrent.Path(2, 8),
        output=recurrent.Output(gate=None),
    ),
    "in context": recurrent.RecurrentMixer(
        mc.memories.RWKV7(),
        query=SHIFTED,
        key=SHIFTED,
        value=SHIFTED,
        coefficients=(
            recurrent.LimitedDecay(recurrent.LowRank(3, "tanh", shift=True)),
            recurrent.InContextRate(recurrent.LowRank(3, shift=True), epsilon=None),
        ),
        output=recurrent.Output(
            norm="group",
            shared_scale=False,
            gate="linear",
            gate_low=recurrent.LowRank(3, "sigmoid", use_bias=False, shift=True),
        ),
        bonus=True,
    ),
    "trapezoid": recurrent.mamba3(2, 4, state_dim=4),
}


def some_mixers(turn, *fast):
    """All, of which ``make test`` runs two, the next ones in the next turn."""
    names = [*MIXERS]
    kept = (names[(2 * turn + i) % len(names)] for i in range(2))
    return pytest.mark.parametrize("name", kept_of(names, *kept, fast=fast))


def cached(mixer, **changes):
    """With caches that a short sequence fills."""
    return recurrent.RecurrentMixer(
        **vars(mixer)
        | dict(segmentation=mc.Constant(4), aggregation=mc.GRM(gate="uniform"))
        | changes
    )


def build(mixer, **options):
    return mixer.build(8, rngs=nnx.Rngs(0), **options)


def inputs(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


@jax.jit
def whole(layer, x, document_ids=None):
    return layer(x, document_ids)


@some_mixers(0)
def test_a_stream_gives_what_one_call_gives(name):
    layer, x = build(cached(MIXERS[name])), inputs(2, 14, 8)

    @jax.jit
    def stream(layer, x):
        cache = layer.init_cache(2, 16)
        first, cache = layer.extend(x[:, :5], cache, jnp.array([5, 3]))
        rows = jnp.array([5, 3])[:, None] + jnp.arange(9)[None]
        rest = jnp.take_along_axis(x, rows[..., None], axis=1)
        second, _ = layer.extend(rest, cache)
        return first, second

    y = whole(layer, x)
    first, second = stream(layer, x)
    assert_close(first[0], y[0, :5], 1e-5)
    assert_close(second[0], y[0, 5:], 1e-5)
    assert_close(first[1, :3], y[1, :3], 1e-5)
    assert_close(second[1], y[1, 3:12], 1e-5)


@some_mixers(1)
def test_documents_come_out_as_alone(name):
    layer, x = build(cached(MIXERS[name])), inputs(1, 14, 8)
    documents = jnp.array([[0] * 8 + [1] * 6])  # the second begins with a segment, as alone
    y = whole(layer, x, documents)
    assert_close(y[:, :8], whole(layer, x[:, :8]), 1e-5)
    assert_close(y[:, 8:], whole(layer, x[:, 8:]), 1e-5)


@some_mixers(2, "state space")
def test_every_parameter_has_a_gradient(name):
    layer, x = build(cached(MIXERS[name])), inputs(1, 14, 8)
    gradients = nnx.jit(nnx.grad(lambda layer, x: jnp.sum(layer(x) ** 2)))(layer, x)
    for path, gradient in nnx.to_flat_state(gradients):
        assert np.abs(gradient[...]).max() > 0, path


@some_mixers(3)
def test_reads_are_those_of_the_functional_core(name):
    layer, x = build(cached(MIXERS[name])), inputs(1, 14, 8)
    operands, kept = layer._tokens(x, None, None)
    rules = dict(memory=layer.memory, aggregation=layer.aggregation, segmentation=mc.Constant(4))
    core = functools.partial(mc.memory_caching, **rules, implementation="reference")
    read = jax.jit(core)(**operands)
    y = layer._output(x, read, kept)
    assert_close(whole(layer, x), y, 1e-5)


@pytest.mark.slow
def test_content_gates_are_uniform_before_training():
    mixer = MIXERS["state space"]
    content, uniform = (
        build(cached(mixer, aggregation=mc.GRM(gate=g))) for g in ("content", "uniform")
    )
    x = inputs(1, 14, 8)
    assert not np.any(content.temperature[...])
    assert not np.any(content.connector.kernel[...])
    nnx.update(content, nnx.state(uniform))
    assert_close(whole(content, x), whole(uniform, x), 1e-6)
    gradients = nnx.jit(nnx.grad(lambda layer: jnp.sum(layer(x) ** 2)))(content)
    assert np.abs(gradients.temperature[...]).max() > 0
    assert np.abs(gradients.connector.kernel[...]).max() > 0


@some_mixers(4)
def test_rows_and_heads_on_a_mesh(name):
    mesh = jax.make_mesh(
        (2, 2), ("rows", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
    )
    layer, x = build(cached(MIXERS[name])), inputs(2, 14, 8)
    y = whole(layer, x)
    with jax.set_mesh(mesh):
        got = whole(layer, jax.device_put(x, jax.NamedSharding(mesh, jax.P("rows"))))
        assert jax.typeof(got).sharding.spec[0] == "rows"
    assert_close(got, y, 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(key=recurrent.Path(3, 6)), "same heads and dim"),
        (dict(value=recurrent.Path(3, 5)), "must divide those of the values"),
        (dict(coefficients=()), "needs the coefficients"),
        (dict(memory=mc.memories.Titans(chunk_size=4)), "needs the coefficients"),
        (dict(aggregation=mc.GRM(gate="position")), "no parameters for gate='position'"),
    ],
    ids=str,
)
def test_parts_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        build(cached(MIXERS["gated delta, grouped"], **change))
