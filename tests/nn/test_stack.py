"""What others attach to layers, alone and in a stack, is none of their weights."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import memcache_jax as mc
from tests.covers import first_kept

MIXERS = (
    mc.nn.MemoryCachingMixer(mc.memories.Titans(4, 2), mc.GRM(), mc.Constant(8)),
    mc.nn.AttentionMixer(),
)
# Without weights, which compiles faster.
LIGHT = (
    mc.nn.MemoryCachingMixer(mc.memories.GatedDeltaNet(), mc.GRM(), mc.Constant(8)),
    mc.nn.AttentionMixer(),
)
TOKENS = jnp.zeros((2, 12), jnp.int32)


def model_of(**changes):
    config: Any = dict(vocab_size=8, num_layers=4, features=16, num_heads=2, mixers=MIXERS)
    return mc.nn.LanguageModel(mc.nn.LanguageModelConfig(**config | changes), rngs=nnx.Rngs(0))


@nnx.jit
def call(model, x):
    return model(x)


@nnx.jit
def extend(model, x, cache):
    return model.extend(x, cache)


def layer_of(memory):
    return mc.nn.MemoryCaching(
        16, 2, memory=memory, aggregation=mc.GRM(), segmentation=mc.Constant(8), rngs=nnx.Rngs(0)
    )


@pytest.mark.parametrize("remat", first_kept(1, [True, False]))
def test_captures_of_a_model(remat):
    model = model_of(mixers=LIGHT, remat=remat)
    wanted = call(model, TOKENS)
    capture: Any = nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)
    got, captured = capture(TOKENS)
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    outputs: Any = dict(nnx.to_flat_state(captured))
    # One entry for each of the two layers of a stack.
    (mixed,) = outputs["layers", "blocks", 1, "mixer", "__call__"].get_value()
    assert mixed.shape == (2, *TOKENS.shape, 16)
    assert abs(mixed[0] - mixed[1]).max() > 1e-3
    np.testing.assert_allclose(call(model, TOKENS), wanted, atol=1e-5)
    hidden, _ = extend(model, TOKENS, model.init_cache(2, 16))
    np.testing.assert_allclose(model.logits(hidden), wanted, atol=1e-5)


class Counting(nnx.Module):
    """A host's mixer that counts the tokens it has seen."""

    def __init__(self, features):
        self.seen = nnx.BatchStat(jnp.zeros(()))
        self.scale = nnx.Param(jnp.ones(features))

    def __call__(self, x, document_ids=None):
        self.seen[...] += x.shape[1] * self.scale[0]
        return x * self.scale[None, None]


@dataclasses.dataclass(frozen=True)
class CountingMixer:
    def build(self, features, num_heads, **options):
        return Counting(features)


def test_what_a_hosts_mixer_keeps_of_each_layer():
    model: Any = model_of(mixers=(CountingMixer(),), num_layers=3)
    model(TOKENS)
    model.layers.blocks[0].mixer.scale[...] *= jnp.array([1.0, 2.0, 3.0])[:, None]
    nnx.jit(lambda model: model(TOKENS))(model)
    np.testing.assert_array_equal(model.layers.blocks[0].mixer.seen[...], [24, 36, 48])


@pytest.mark.slow
def test_captures_of_a_layer():
    layer = layer_of(mc.memories.Titans(4, 2))
    x = jax.random.normal(jax.random.key(0), (2, 12, 16))
    capture: Any = nnx.capture(layer, nnx.Intermediate, method_outputs=nnx.Intermediate)
    got, captured = capture(x)
    np.testing.assert_allclose(got, call(layer, x), atol=1e-5)
    (rates,) = dict(nnx.to_flat_state(captured))["controls", "eta", "__call__"].get_value()
    assert rates.shape == (2, 12, 2)


@pytest.mark.parametrize("stacked", first_kept(1, [True, False]))
def test_adapters_and_what_they_train(stacked):
    """Flax's LoRA around projections: alone, and one in each layer of a stack."""
    model: Any
    rngs = nnx.Rngs(1)
    if stacked:
        model, x = model_of(mixers=LIGHT), TOKENS
        mixers = [block.mixer for block in model.layers.blocks]

        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=(0, 0), out_axes=0)
        def around(rngs, base):
            return nnx.LoRA(16, 3, 16, base_module=base, rngs=rngs)

        for mixer in mixers:
            mixer.value = around(rngs, mixer.value)
    else:
        model = layer_of(mc.memories.GatedDeltaNet())
        x = jax.random.normal(jax.random.key(0), (2, 12, 16))
        model.query = nnx.LoRA(16, 3, 16, base_module=model.query, rngs=rngs)
    before = nnx.to_pure_dict(nnx.state(model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))))
    before = jax.tree.map(np.asarray, before)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer, x):
        def loss(model):
            return jnp.mean((model(x) - 1) ** 2)

        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, gradients)
        return value

    losses = [step(model, optimizer, x) for _ in range(5)]
    assert losses[-1] < losses[0]
    after = nnx.to_pure_dict(nnx.state(model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    y, _ = extend(model, x, model.init_cache(2, 16))
    wanted = nnx.jit(lambda model, x: model.hidden(x) if stacked else model(x))(model, x)
    np.testing.assert_allclose(y, wanted, atol=2e-5)


@pytest.mark.slow
def test_one_adapter_for_all_layers_of_the_rank_of_their_number():
    model = model_of(mixers=LIGHT, num_layers=8)
    wanted = call(model, TOKENS)
    mixer: Any = model.layers.blocks[0].mixer
    mixer.value = nnx.LoRA(16, 4, 16, base_module=mixer.value, rngs=nnx.Rngs(1))
    np.testing.assert_allclose(call(model, TOKENS), wanted, atol=1e-5)


@pytest.mark.slow
def test_what_is_attached_is_not_scanned():
    model = model_of()
    wanted = call(model, TOKENS)
    model.layers.note = "a host's"
    mixer = model.layers.blocks[0].mixer
    mixer.weights.note = "a host's"
    mixer.weights.other = nnx.Variable(jnp.ones(3))
    mixer.controls.other = nnx.Param(jnp.ones(()))
    np.testing.assert_allclose(call(model, TOKENS), wanted, atol=1e-5)
    model.init_cache(2, 16)
    assert mixer.weights.other[...].shape == (3,)
