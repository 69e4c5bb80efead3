"""Blocks that see the token before, and layers that mix in the values of the first."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core.spmd import logical_axis_rules
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import memcache_jax as mc
from memcache_jax.nn import recurrent
from memcache_jax.nn.unrolled import Unrolled
from tests.cases import assert_close
from tests.covers import first_kept

VOCAB, LENGTH = 17, 16
RULES = (("batch", "rows"), ("length", "part"), ("heads", "model"))


def mixer(first=None, **options):
    path = recurrent.Path(2, 4, shift=True, conv_width=3)
    value = recurrent.Path(2, 6, shift=True, first=first)
    options["segmentation"] = mc.Constant(8)
    return recurrent.RecurrentMixer(mc.memories.RetNet(), path, path, value, **options)


def copy(model):
    """A model with variables of its own."""
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda x: x, state))


def config(**options: Any):
    """One layer that shares its values, and two that mix them in."""
    low = recurrent.LowRank(3)
    mixers = mixer(shares_values=True), mixer(low), mixer(low)
    blocks = tuple(mc.nn.BlockConfig(mixer, mc.nn.ChannelMix(12)) for mixer in mixers)
    norm = mc.nn.Norm("layer")
    options = dict[str, Any](blocks=blocks, embedding_norm=norm) | options
    return mc.nn.LanguageModelConfig(VOCAB, 3, 8, 2, **options)


@pytest.fixture(scope="module")
def model():
    model = mc.nn.LanguageModel(config(), rngs=nnx.Rngs(0))
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] == "mix":  # not one share for all channels
            param.set_value(jnp.broadcast_to(jnp.linspace(0.1, 0.9, 8), param.shape))
    return model


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(VOCAB, size=(2, LENGTH)))


@nnx.jit
def whole(model, tokens, document_ids=None):
    return model(tokens, document_ids)


@pytest.mark.slow
def test_each_row_of_a_stream_takes_its_own_number_of_tokens(model, tokens):
    expected, extend = whole(model, tokens), jax.jit(type(model).extend)
    cache = model.init_cache(2, LENGTH)
    assert cache.repeats == (1, 2)
    hidden, cache = extend(model, tokens[:, :8], cache, jnp.array([8, 3]))
    assert_close(model.logits(hidden)[0], expected[0, :8], 1e-5)
    assert_close(model.logits(hidden)[1, :3], expected[1, :3], 1e-5)
    cache = cache.take(jnp.array([1, 0]))
    rest = jnp.stack([tokens[1, 3:11], tokens[0, 8:]])
    hidden, cache = extend(model, rest, cache, None)
    assert_close(model.logits(hidden)[0], expected[1, 3:11], 1e-5)
    assert_close(model.logits(hidden)[1], expected[0, 8:], 1e-5)
    cache = cache.reset(jnp.array([True, False]))
    hidden, _ = extend(model, tokens[:, :1], cache, jnp.array([1, 0]))
    assert_close(model.logits(hidden)[0], expected[0, :1], 1e-5)


@pytest.mark.slow
def test_no_document_sees_another(model, tokens):
    begin = 8
    documents = jnp.where(jnp.arange(LENGTH) < begin, 0, 1)[None].repeat(2, axis=0)
    logits = whole(model, tokens, documents)
    later = jnp.pad(tokens[:, begin:], ((0, 0), (0, begin)))
    assert_close(logits[:, :begin], whole(model, tokens)[:, :begin], 1e-5)
    assert_close(logits[:, begin:], whole(model, later)[:, : LENGTH - begin], 1e-5)


@pytest.mark.slow
def test_what_layers_take_of_the_first_is_what_the_equations_say(model, tokens):
    """The second layer, whose share of the first one's values is all."""
    both = copy(model)
    second = both.layers[1].blocks[0].mixer.value
    second.first.up.kernel.set_value(jnp.zeros_like(second.first.up.kernel[...]))
    second.first.up.bias.set_value(jnp.full_like(second.first.up.bias[...], 40.0))
    logits = whole(both, tokens)
    second.linear.kernel.set_value(jnp.ones_like(second.linear.kernel[...]))  # not seen
    assert_close(whole(both, tokens), logits, 1e-5)
    assert np.abs(whole(model, tokens) - logits).max() > 1e-3


@pytest.mark.slow
def test_a_list_of_layers_remat_and_gates(model, tokens):
    expected = whole(model, tokens)
    unrolled = Unrolled(copy(model))
    assert_close(unrolled.outer.logits(nnx.jit(Unrolled.hidden)(unrolled, tokens)), expected, 1e-5)
    cache = unrolled.init_cache(2, LENGTH)
    hidden, _ = nnx.jit(Unrolled.extend)(unrolled, tokens, cache, None)
    assert_close(unrolled.outer.logits(hidden), expected, 1e-5)
    again = copy(model)
    again.config = dataclasses.replace(model.config, remat=True)
    assert_close(whole(again, tokens), expected, 1e-6)
    assert [gates.shape for gates in model.gates(tokens)] == [(2, LENGTH, 2, 2)] * 3


@pytest.mark.parametrize("kind", first_kept(1, [AxisType.Explicit, AxisType.Auto]))
def test_on_a_mesh(model, tokens, kind):
    """Rows, time and heads are divided, so that tails cross the mesh."""
    documents = jnp.where(jnp.arange(LENGTH) < 8, 0, 1)[None].repeat(2, axis=0)

    def loss(model, tokens, documents):
        logits = model(tokens, documents)
        return jnp.mean(logits**2), logits

    alone, model = model, copy(model)  # NNX puts its parameters on the mesh
    step = nnx.jit(nnx.value_and_grad(loss, has_aux=True))
    expected, stream = step(model, tokens, documents), nnx.jit(type(model).extend)
    mesh = jax.make_mesh((2, 2, 2), ("rows", "part", "model"), axis_types=(kind,) * 3)
    with jax.set_mesh(mesh), logical_axis_rules(RULES):
        laid = [
            jax.device_put(x, NamedSharding(mesh, P("rows", "part"))) for x in (tokens, documents)
        ]
        got = step(model, *laid)
        rows = jax.device_put(tokens, NamedSharding(mesh, P("rows")))
        cache = model.init_cache(2, LENGTH, sharding=P("rows", "model"))
        hidden, _ = stream(model, rows, cache)
    assert_close(jax.device_get(got), jax.device_get(expected), 1e-4)
    assert_close(alone.logits(jnp.asarray(jax.device_get(hidden))), whole(alone, tokens), 1e-5)


def test_values_that_nobody_shares_are_refused():
    low = recurrent.LowRank(3)
    with pytest.raises(ValueError, match="none is shared before it"):
        config(blocks=None, mixers=(mixer(low),))
    with pytest.raises(ValueError, match="only one mixer may share"):
        config(blocks=None, mixers=(mixer(shares_values=True),) * 3)
    layer = mixer(low).build(8, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="part of a LanguageModel"):
        layer(jnp.ones((1, 4, 8)))
    path = recurrent.Path(2, 4, first=low)
    with pytest.raises(ValueError, match="only values are shared"):
        recurrent.RecurrentMixer(mc.memories.RetNet(), path, path, path)
