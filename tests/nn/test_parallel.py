"""Two mixers side by side."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import memcache_jax as mc
from tests.cases import assert_close

MIXER = mc.nn.ParallelMixer(
    mc.nn.MemoryCachingMixer(mc.memories.RetNet(), mc.GRM(gate="uniform"), mc.Constant(4)),
    mc.nn.AttentionMixer(),
    left_scale=0.5,
    right_scale=-2.0,
)


@pytest.fixture(scope="module")
def model():
    config = mc.nn.LanguageModelConfig(17, 2, 8, 2, mixers=(MIXER,), mlp_features=0)
    return mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))


@nnx.jit
def whole(model, tokens, document_ids=None):
    return model(tokens, document_ids)


def test_the_sum_of_both():
    layer = MIXER.build(8, 2, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 6, 8))
    assert_close(layer(x), 0.5 * layer.left(x) - 2 * layer.right(x), 1e-6)


@pytest.mark.slow
def test_a_stream_takes_and_empties_rows_of_both(model):
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 17)
    expected, extend = whole(model, tokens), jax.jit(type(model).extend)
    cache = model.init_cache(2, 12)
    assert cache.max_length == 12
    hidden, cache = extend(model, tokens[:, :5], cache, jnp.array([5, 3]))
    assert_close(model.logits(hidden)[0], expected[0, :5], 1e-5)
    cache = cache.take(jnp.array([1, 0])).reset(jnp.array([False, True]))
    hidden, _ = extend(model, jnp.stack([tokens[1, 3:8], tokens[0, :5]]), cache, None)
    assert_close(model.logits(hidden)[0], expected[1, 3:8], 1e-5)
    assert_close(model.logits(hidden)[1], expected[0, :5], 1e-5)


@pytest.mark.slow
def test_caches_are_added_to_the_one_that_is_a_memory(model):
    tokens = jax.random.randint(jax.random.key(0), (1, 12), 0, 17)
    other = mc.nn.with_memory_caching(model, segmentation=mc.Constant(6))
    (mixer,) = other.config.mixers
    assert mixer.left.segmentation == mc.Constant(6)
    assert_close(whole(other, tokens)[:, :4], whole(model, tokens)[:, :4], 1e-5)
    assert [gates.shape for gates in other.gates(tokens)] == [(1, 12, 2, 2)] * 2


@pytest.mark.slow
def test_gates_of_both_have_names():
    one = mc.nn.MemoryCachingMixer(mc.memories.RetNet(), mc.GRM(), mc.Constant(4))
    other = mc.nn.MemoryCachingMixer(mc.memories.RetNet(), mc.GRM(), mc.Constant(6))
    mixers = mc.nn.ParallelMixer(one, mc.nn.ParallelMixer(MIXER, other)), one
    config = mc.nn.LanguageModelConfig(17, 2, 8, 2, mixers=mixers, mlp_features=0)
    model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
    both, alone = jax.eval_shape(model.gates, jnp.zeros((1, 12), jnp.int32))
    shapes = {name: gates.shape for name, gates in both.items()}
    four, six = (1, 12, 2, 3), (1, 12, 2, 2)
    assert shapes == {"left": four, "right.left.left": four, "right.right": six}
    assert alone.shape == four


def test_what_is_no_mixer_is_refused():
    with pytest.raises(ValueError, match="left must be a mixer"):
        mc.nn.ParallelMixer(mc.nn.AttentionMixer, mc.nn.AttentionMixer())
