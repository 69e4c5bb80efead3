"""Caches for a model that was trained without them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from tests.cases import MEMORIES, assert_close
from tests.covers import first_kept


def model(aggregation, segmentation, memory="titans"):
    config = mc.nn.LanguageModelConfig(
        vocab_size=19,
        num_layers=2,
        features=16,
        num_heads=2,
        mixers=(
            mc.nn.MemoryCachingMixer(MEMORIES[memory], aggregation, segmentation),
            mc.nn.AttentionMixer(window=8),
        ),
    )
    return mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("memory", first_kept(1, ["titans", "gated_deltanet"]))
def test_it_is_the_model_that_was_made_with_caches(memory):
    trained = model(mc.Residual(), mc.Constant(1024), memory)
    longer = mc.nn.with_memory_caching(trained, segmentation=mc.Constant(16))
    wanted = model(mc.GRM(gate="uniform"), mc.Constant(16), memory)
    assert longer.config == wanted.config
    assert_close(nnx.state(longer), nnx.state(trained), 0.0)
    call = nnx.jit(lambda model, tokens: model(tokens))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 19, (1, 40)))
    assert_close(call(longer, tokens), call(wanted, tokens), 1e-5)
    base = call(trained, tokens)
    assert_close(call(longer, tokens)[:, :16], base[:, :16], 1e-5)
    assert np.abs(call(longer, tokens) - base)[:, 16:].max() > 1e-3


def test_parameters_are_shared_and_the_model_is_left_alone():
    trained = model(mc.Residual(), mc.Constant(1024))
    config = trained.config
    longer = mc.nn.with_memory_caching(
        trained, segmentation=mc.Constant(16), aggregation=mc.Soup(gate="uniform")
    )
    new, old = (jax.tree.leaves(nnx.state(m)) for m in (longer, trained))
    assert all(x is y for x, y in zip(new, old, strict=True))
    assert trained.config == config
    layers = [m for _, m in nnx.iter_modules(trained) if isinstance(m, mc.nn.MemoryCaching)]
    assert [layer.aggregation for layer in layers] == [mc.Residual()]


@pytest.mark.slow
def test_soup_with_uniform_gates_decodes_in_constant_memory():
    trained = model(mc.Residual(), mc.Constant(1024))
    longer = mc.nn.with_memory_caching(
        trained, segmentation=mc.Constant(8), aggregation=mc.Soup(gate="uniform")
    )
    few, many = (
        mc.nn.cache_bytes(jax.eval_shape(lambda length=length: longer.init_cache(1, length)))
        for length in (40, 400_000)
    )
    assert few == many
    graph, state = nnx.split(longer)
    step = jax.jit(lambda tokens, cache: nnx.merge(graph, state).extend(tokens, cache))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 19, (1, 40)))
    cache, hidden = longer.init_cache(1, 40), []
    for t in range(40):
        y, cache = step(tokens[:, t : t + 1], cache)
        hidden.append(y)
    wanted = nnx.jit(lambda model, tokens: model.hidden(tokens))(longer, tokens)
    assert_close(jnp.concatenate(hidden, axis=1), wanted, 2e-5)


def test_errors():
    trained = model(mc.Residual(), mc.Constant(1024))
    with pytest.raises(ValueError, match="lacks the parameters for GRM"):
        mc.nn.with_memory_caching(trained, segmentation=mc.Constant(16), aggregation=mc.GRM())
    with pytest.raises(ValueError, match="must divide the segment size"):
        mc.nn.with_memory_caching(trained, segmentation=mc.Constant(6))
    with pytest.raises(ValueError, match="Linear has no layer of memory caching"):
        mc.nn.with_memory_caching(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), segmentation=mc.Constant(6))


def test_layers_that_read_the_states_of_others():
    def grouped(**follower):
        own = mc.nn.MemoryCachingMixer(MEMORIES["linear"], mc.SSC(1), mc.Constant(16))
        mixers = own, dataclasses.replace(own, states="previous", **follower)
        config = mc.nn.LanguageModelConfig(19, 2, features=16, num_heads=2, mixers=mixers)
        return mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))

    model = grouped()
    to: dict[str, Any] = dict(segmentation=mc.Constant(8))
    longer = mc.nn.with_memory_caching(model, aggregation=mc.GRM(), **to)
    _, follower = longer.config.mixers
    assert isinstance(follower, mc.nn.MemoryCachingMixer)
    assert (follower.aggregation, follower.segmentation) == (mc.GRM(), mc.Constant(8))
    with pytest.raises(ValueError, match=r"layers with states='previous', which needs .*uniform"):
        mc.nn.with_memory_caching(model, **to)
    with pytest.raises(ValueError, match=r"layers with connector='previous', which needs SSC; got"):
        mc.nn.with_memory_caching(grouped(connector="previous"), aggregation=mc.GRM(), **to)
