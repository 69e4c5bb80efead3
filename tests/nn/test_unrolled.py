"""A language model whose layers are a list."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from memcache_jax.nn import unrolled
from memcache_jax.nn.unrolled import Unrolled
from tests.cases import assert_close
from tests.nn.adapters.hosts import MIXERS, VOCAB, random_tokens


def language_model(*mixers, names=None, num_layers=2, **options):
    mixers = tuple(MIXERS[mixer] for mixer in mixers)
    config = mc.nn.LanguageModelConfig(VOCAB, num_layers, 16, 2, mixers=mixers, **options)
    return mc.nn.LanguageModel(config, axis_names=names, rngs=nnx.Rngs(0))


@nnx.jit
def plain(model, tokens):
    return model(tokens)


@pytest.mark.slow
@pytest.mark.parametrize("names", [None, dict(embed="fsdp", layers="stage")], ids=["ours", "host"])
def test_the_layers_are_a_list_and_come_back(names):
    original = language_model("memory", "attention", names=names, num_layers=4)
    model = Unrolled(original)
    tokens = random_tokens(2, 9)
    shapes = [layer.blocks[0].mixer.query.kernel.shape for layer in model.layers]
    assert shapes == [(16, 16)] * 2
    back = model.language_model()
    np.testing.assert_array_equal(plain(back, tokens), plain(original, tokens))
    for new, old in zip(*map(jax.tree.leaves, map(nnx.state, (back, original))), strict=True):
        np.testing.assert_array_equal(new, old)
    specs = [nnx.get_partition_spec(nnx.state(x)) for x in (back, original)]
    assert specs[0] == specs[1]
    kernel = model.layers[0].blocks[0].mlp.up.kernel
    wanted = ("embed", "mlp") if names is None else ("fsdp", None)
    assert kernel.get_metadata()["out_sharding"] == wanted


@pytest.mark.slow
def test_recomputed_layers_have_the_same_gradients(x64):
    tokens, wide = random_tokens(2, 9), jnp.float64
    model = Unrolled(language_model("memory", dtype=wide, param_dtype=wide))
    gradients = nnx.jit(nnx.grad(lambda model: (model(tokens) ** 2).sum()))
    expected = gradients(model)
    model.config = dataclasses.replace(model.config, remat=True)
    assert_close(gradients(model), expected, 1e-10)


def test_parameters_of_lora_have_no_place_in_a_language_model():
    model = Unrolled(language_model("memory"))
    model.layers[0].blocks[0].mixer.query.kernel_lora_a = nnx.LoRAParam(jnp.ones((16, 2)))
    with pytest.raises(ValueError, match="LoRA"):
        model.language_model()


@pytest.mark.slow
def test_few_large_layers_decode_apart(monkeypatch):
    """A row's tokens are those of layers in a loop, also in a batcher and with drafts."""
    model = language_model("memory")
    prompts = random_tokens(3, 9)
    wanted = mc.generate(model, prompts, 12, temperature=0)[:, 9:].tolist()
    assert unrolled.for_steps(model) is model
    monkeypatch.setattr(unrolled, "_LEAST_BYTES", 0)
    assert isinstance(unrolled.for_steps(model), Unrolled)
    got = mc.generate(model, prompts[:2], 12, temperature=0)[:, 9:].tolist()
    drafted = mc.generate(model, prompts[:1], 12, temperature=0, draft=mc.NGrams(tokens=3))
    batcher = mc.Batcher(model, rows=2, max_length=30, piece=4)
    requests = [batcher.submit(prompt, 12) for prompt in prompts]
    batcher.run()
    assert got == wanted[:2]
    assert drafted[:, 9:].tolist() == wanted[:1]
    assert [request.tokens for request in requests] == wanted


@pytest.mark.slow
def test_the_caches_of_a_list_go_back():
    model, tokens = Unrolled(language_model("memory", "attention")), random_tokens(2, 9)
    extend = nnx.jit(lambda model, tokens, cache: model.extend(tokens, cache, None))
    hidden, cache = extend(model, tokens, model.init_cache(2, 20, rewind=3))
    assert cache.rewindable.tolist() == [3, 3]
    back = cache.rewind(np.array([3, 3]))
    assert back.position.tolist() == [6, 6]
    again, _ = extend(model, jnp.concatenate([tokens[:, 6:], tokens[:, :6]], axis=1), back)
    assert_close(again[:, :3], hidden[:, 6:], 1e-5)
    with pytest.raises(ValueError, match=r"at most \[0, 0\] tokens"):
        back.rewind(np.array([1, 0]))


def test_a_cache_apart_and_together():
    model = language_model("memory", "attention", num_layers=4)
    leaves, structure = jax.tree.flatten(model.init_cache(2, 12))
    cache = jax.tree.unflatten(structure, [x + i for i, x in enumerate(leaves)])
    apart = unrolled.unrolled_cache(model.config, cache)
    again = unrolled.stacked_cache(model.config, apart, cache.max_length)
    assert jax.tree.structure(again) == structure
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(one, other)
