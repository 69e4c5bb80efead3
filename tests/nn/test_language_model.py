"""The language model: a scanned stack of any mixers, remat, tied embeddings, precision."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import memcache_jax as mc
from tests.cases import assert_close, scheduled
from tests.covers import first_kept, kept_of, product

CACHING = mc.nn.MemoryCachingMixer(
    mc.memories.Titans(chunk_size=4, expansion=2), mc.GRM(), mc.Constant(8)
)
CONFIG = mc.nn.LanguageModelConfig(
    vocab_size=19, num_layers=4, features=16, num_heads=2, mixers=(CACHING,)
)
MIXERS = {
    "memory caching": (CACHING,),
    "attention": (mc.nn.AttentionMixer(),),
    "sliding window": (mc.nn.AttentionMixer(window=5),),
    "interleaved": (CACHING, mc.nn.AttentionMixer(window=5)),
}


def make(**changes):
    return mc.nn.LanguageModel(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0))


def ids(length=13, seed=0):
    return jax.random.randint(jax.random.key(seed), (2, length), 0, 19)


def call(model, tokens):
    return jax.jit(lambda model, tokens: model(tokens))(model, tokens)


def gradient(model, tokens):
    """The logits, and the gradient of the sum of their squares."""
    graph, params = nnx.split(model)

    @jax.jit
    def both(params):
        logits, pull = jax.vjp(lambda p: nnx.merge(graph, p)(tokens), params)
        return logits, pull(2 * logits)[0]

    return both(params)


LINEAR = (mc.nn.MemoryCachingMixer(mc.memories.LinearAttention(), mc.GRM(), mc.Constant(8)),)
WIDE: Any = dict(mixers=LINEAR, dtype=jnp.float64, param_dtype=jnp.float64)


@functools.cache
def with_remat():
    """``gradient`` of a model with remat in float64."""
    return gradient(make(**WIDE, remat=True), ids())


@pytest.mark.parametrize("mixers", kept_of(MIXERS, "interleaved"))
def test_scan_equals_the_blocks_one_by_one(mixers):
    model, tokens = make(mixers=mixers), ids()

    @nnx.jit
    def one_by_one(model, tokens):
        graph, stacked = nnx.split(model.layers)
        x = model.embedding(tokens)
        for i in range(4 // len(mixers)):
            period = nnx.merge(graph, jax.tree.map(lambda p, i=i: p[i], stacked))
            assert len(period.blocks) == len(mixers)
            for block in period.blocks:
                x = x + block.mixer(block.mixer_norm(x))
                x = x + block.mlp(block.mlp_norm(x))
        return model.head(model.norm(x))

    assert_close(call(model, tokens), one_by_one(model, tokens), 1e-5)


@pytest.mark.parametrize(
    "mixers", kept_of(MIXERS, "memory caching", "sliding window", fast=["attention"])
)
def test_logits_see_no_later_token(mixers):
    model, tokens = make(mixers=mixers), ids()
    y = call(model, tokens)
    changed = call(model, tokens.at[:, 9:].set((tokens[:, 9:] + 1) % 19))
    assert_close(changed[:, :9], y[:, :9], 1e-5)
    assert float(jnp.abs(changed[:, 9:] - y[:, 9:]).max()) > 1e-3


@pytest.mark.parametrize(
    ("tied", "mesh"), product([False, True], {"one": None, "mesh": (2, 2)}, turn=0)
)
def test_logits_of_bfloat16_are_products_in_float32(tied, mesh):
    narrow = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, tie_embeddings=tied)
    model = make(**narrow, vocab_size=512, num_layers=1, mixers=MIXERS["attention"])
    hidden = jax.random.normal(jax.random.key(1), (2, 32, 16), jnp.bfloat16)
    matrix = model.embedding.embedding[...].T if tied else model.head.kernel[...]
    wanted = np.asarray(hidden, np.float64) @ np.asarray(matrix, np.float64)
    if mesh is None:
        logits = model.logits(hidden)
    else:
        devices, explicit = jax.devices()[:4], (AxisType.Explicit,) * 2
        mesh = jax.make_mesh(mesh, ("rows", "model"), explicit, devices=devices)
        variable = model.embedding.embedding if tied else model.head.kernel
        with jax.set_mesh(mesh):
            divided = P("model", None) if tied else P(None, "model")
            variable.set_value(jax.device_put(variable[...], NamedSharding(mesh, divided)))
            logits = model.logits(jax.device_put(hidden, NamedSharding(mesh, P("rows"))))
        assert jax.typeof(logits).sharding.spec == P("rows", None, "model")
    assert logits.dtype == jnp.float32
    assert_close(logits, wanted.astype(np.float32), 1e-6)
    np.testing.assert_array_equal(logits.argmax(-1), wanted.argmax(-1))


@pytest.mark.slow
def test_no_two_layers_start_alike():
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(make().layers)):
        assert leaf.shape[0] == 4, jax.tree_util.keystr(path)
        if leaf.ndim > 2 and float(leaf.std()) > 0:
            assert not np.array_equal(leaf[0], leaf[1]), jax.tree_util.keystr(path)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_remat_changes_no_number_and_saves_less():
    tokens, plain, remat = ids(), make(**WIDE), make(**WIDE, remat=True)
    (logits, slopes), wanted = with_remat(), gradient(plain, tokens)
    assert_close(logits, wanted[0], 1e-12)
    assert_close(slopes, wanted[1], 1e-10)

    def saved(model):
        pull = jax.eval_shape(lambda model: jax.vjp(lambda model: model(tokens), model)[1], model)
        return sum(x.size for x in jax.tree.leaves(pull))

    assert saved(remat) < saved(plain) / 3


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_states_on_the_host_change_no_number_and_are_not_written_anew():
    from experiments._flops import count_flops

    tokens = ids()
    options = ({}, dict(offload_states=True), dict(keep_states=True))
    remat, offload, keep = (make(**WIDE, remat=True, **each) for each in options)
    assert_close(gradient(offload, tokens), with_remat(), 1e-12)

    flops = [count_flops(gradient, model, tokens) for model in (remat, offload, keep)]
    assert flops[1] == flops[2] < flops[0]
    # Here the host is the device: what a TPU program would move is told by the traced form alone.
    assert "host" in str(jax.make_jaxpr(gradient)(offload, tokens)).lower()
    with pytest.raises(ValueError, match="offload_states needs remat"):
        make(offload_states=True)
    with pytest.raises(ValueError, match="keep_states and offload_states"):
        make(remat=True, keep_states=True, offload_states=True)


@pytest.mark.slow
def test_tied_embeddings_are_the_output_layer():
    model = make(mixers=LINEAR, tie_embeddings=True)
    assert not hasattr(model, "head")
    tokens = ids()

    @nnx.jit
    def both(model, tokens):
        wanted = model.hidden(tokens) @ model.embedding.embedding[...].T
        return model(tokens), wanted

    assert_close(*both(model, tokens), 1e-5)


@pytest.mark.slow
def test_blocks_without_an_mlp():
    model = make(mixers=LINEAR, mlp_features=0)
    assert not any("mlp" in str(path) for path, _ in nnx.to_flat_state(nnx.state(model)))
    assert call(model, ids()).shape == (2, 13, 19)


@pytest.mark.slow
def test_bfloat16_has_float32_parameters_and_logits():
    model = make(mixers=LINEAR, dtype=jnp.bfloat16)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(nnx.state(model)))
    logits = call(model, ids())
    assert logits.dtype == jnp.float32
    wanted = call(make(mixers=LINEAR), ids())
    assert float(jnp.linalg.norm(logits - wanted) / jnp.linalg.norm(wanted)) < 0.1


@pytest.mark.slow
def test_compiled_program_does_not_grow_with_depth():
    def size(layers):
        model = make(num_layers=layers)
        return len(jax.make_jaxpr(lambda model: model(ids()))(model).jaxpr.eqns)

    assert size(2) == size(12)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("tokens", [jnp.zeros((3,), int), jnp.zeros((2, 3))])
def test_tokens_that_are_none(tokens):
    with pytest.raises(ValueError, match="tokens must be integers of shape"):
        make()(tokens)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("mixers", "options", "tolerance"),
    first_kept(
        1,
        {
            "hybrid with remat and gradients": (MIXERS["interleaved"], {"remat": True}, 1e-6),
            "attention": ((mc.nn.AttentionMixer(),), {}, 1e-6),
            "hybrid in bfloat16": (MIXERS["interleaved"], {"dtype": jnp.bfloat16}, 1e-2),
        },
    ),
)
def test_a_model_sees_one_document(mixers, options, tolerance):
    border, length = 24, 37
    ids = np.array([[0] * 8 + [1] * 12 + [5, 5, 0, 7] + [0] * 13])
    sizes: dict[str, Any] = dict(vocab_size=19, num_layers=2, features=8, num_heads=2)
    dtypes: dict[str, Any] = dict(dtype=jnp.float64, param_dtype=jnp.float64)
    config = mc.nn.LanguageModelConfig(mixers=mixers, **sizes, **(dtypes | options))
    graph, params = nnx.split(mc.nn.LanguageModel(config, rngs=nnx.Rngs(0)))

    def last(params, tokens, ids):
        """The last document's logits."""
        return nnx.merge(graph, params)(tokens, ids)[:, border - length :]

    @jax.jit
    def outputs(params, tokens, ids):
        with scheduled("in_turn"):
            if not config.remat:
                return last(params, tokens, ids)
            y, pull = jax.vjp(lambda params: last(params, tokens, ids), params)
            return y, pull(jnp.cos(y))

    tokens = np.random.default_rng(0).integers(0, 19, (1, length))
    together = outputs(params, tokens, ids)
    assert_close(together, outputs(params, tokens[:, border:], None), tolerance)


@pytest.mark.parametrize("types", ["Auto", "Explicit"])
def test_ids_outside_the_vocabulary(types):
    model = make(num_layers=1, mixers=(mc.nn.AttentionMixer(),))
    wrong = jnp.tile(ids(), (2, 1)).at[0, 5].set(-1).at[1, 3].set(19)
    hidden = jax.jit(lambda model, tokens: model.hidden(tokens))
    for outside, calls in ((wrong[:1], "got -1"), (wrong[1:2], "got 19")):
        for call in (model, model.hidden):
            with pytest.raises(ValueError, match=f"ids from 0 to 18, {calls}"):
                call(outside)
    if types == "Explicit":
        mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
        with jax.set_mesh(mesh):
            got = hidden(model, jax.device_put(wrong, P("data")))
    else:
        got = hidden(model, wrong)
    finite = np.isfinite(got).all(axis=-1)
    assert not finite[0, 5:].any()
    assert not finite[1, 3:].any()
    assert finite[2:].all()
