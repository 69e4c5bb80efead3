"""Memory as context: the equation and its gradients, streams, documents, and any memory."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from memcache_jax.nn.rotary import rotate
from tests.cases import AGGREGATIONS, MEMORIES, assert_close
from tests.covers import kept_of

WINDOW, PERSISTENT, HEADS, DIM = 6, 3, 2, 4
MEMORY = mc.nn.MemoryCachingMixer(mc.memories.GatedDeltaNet(), mc.SSC(2), mc.Constant(4))
MIXER = mc.nn.MemoryAsContextMixer(MEMORY, WINDOW, PERSISTENT)
MEMORIES_OF_LAYERS = {
    "titans soup": mc.nn.MemoryCachingMixer(
        MEMORIES["titans"], AGGREGATIONS["soup"], mc.Logarithmic(4)
    ),
    "rwkv7 exact": mc.nn.MemoryCachingMixer(MEMORIES["rwkv7"], mc.GRM(exact=2), mc.Adaptive(4, 8)),
    "both sides": mc.nn.ParallelMixer(MEMORY, mc.nn.AttentionMixer(window=3)),
}


def layer(mixer=MIXER):
    return mixer.build(HEADS * DIM, HEADS, rngs=nnx.Rngs(0))


def inputs(length):
    return jax.random.normal(jax.random.key(0), (2, length, HEADS * DIM))


def equation(layer, x, document_ids=None):
    """All tokens at once, with a mask."""
    attention, documents = layer.attention, () if document_ids is None else (document_ids,)
    recalled, place = layer.memory(x, *documents), np.arange(x.shape[1])
    ids = np.zeros(x.shape[:2]) if document_ids is None else np.asarray(document_ids)
    begins = np.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0))) | (place % WINDOW == 0)
    first = np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    seen = (place[:, None] >= place) & (first[:, :, None] == first[:, None])

    def heads(x):
        return x.reshape(*x.shape[:2], HEADS, DIM)

    def turned(x):
        return rotate(heads(x), attention.rope_base, jnp.asarray(place - first))

    def joined(always, *rows):
        return jnp.concatenate([jnp.stack([always[...]] * 2), *rows], axis=1)

    keys = (turned(attention.key(z)) for z in (recalled, x))
    values = (heads(attention.value(z)) for z in (recalled, x))
    key = joined(attention.persistent_key, *keys)
    value = joined(attention.persistent_value, *values)
    seen = np.concatenate([np.ones((*x.shape[:2], PERSISTENT), bool), seen, seen], axis=2)
    scores = jnp.einsum("bthk,bshk->bhts", turned(attention.query(x)), key) / DIM**0.5
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf))
    y = jnp.einsum("bhts,bshk->bthk", weights, value).reshape(x.shape)
    return attention.out(y) * jax.nn.sigmoid(recalled)


@pytest.mark.parametrize("of", kept_of(["one block", "documents in blocks"], "documents in blocks"))
def test_values_and_gradients_are_those_of_the_equation(of):
    length, ids = 20 if of == "one block" else 150, None
    x = inputs(length)
    if of == "documents in blocks":
        ids = jnp.asarray(np.arange(length)[None] // np.array([[40], [33]]))
    graph, state = nnx.split(layer())

    def loss(of, state, x):
        y = of(nnx.merge(graph, state), x)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

    def both(of):
        return jax.jit(
            jax.value_and_grad(lambda *args: loss(of, *args), argnums=(0, 1), has_aux=True)
        )(state, x)

    (_, y), gradient = both(lambda layer, x: layer(x, ids))
    (_, wanted), wanted_gradient = both(lambda layer, x: equation(layer, x, ids))
    assert_close(y, wanted, 1e-5)
    jax.tree.map(lambda a, b: assert_close(a, b, 2e-5), gradient, wanted_gradient)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_streams_are_one_pass():
    length = 40
    config = mc.nn.LanguageModelConfig(17, 2, 8, HEADS, mixers=(MIXER,), mlp_features=0)
    model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, length), 0, 17)
    wanted = jax.jit(model.hidden)(tokens)
    extend, cache = jax.jit(model.extend), model.init_cache(2, length, rewind=5)
    assert [name for name in mc.nn.cache_bytes(cache) if "values" in name] == ["keys and values"]
    told, rng = np.zeros(2, int), np.random.default_rng(0)
    while (told < length).any():
        piece = np.minimum(told[:, None] + np.arange(11), length - 1)
        counts = np.minimum(rng.integers(12, size=2), length - told)
        hidden, cache = extend(tokens[np.arange(2)[:, None], piece], cache, jnp.asarray(counts))
        for row, (begin, count) in enumerate(zip(told, counts, strict=True)):
            assert_close(hidden[row, :count], wanted[row, begin : begin + count], 2e-5, scale=3.0)
        back = rng.integers(1 + np.minimum(np.asarray(cache.rewindable), 3))
        cache, told = cache.rewind(back), told + counts - back
    cache = cache.take(np.array([1, 0])).reset(np.array([True, False]))
    hidden, _ = extend(tokens[:, :11], cache, jnp.array([11, 0]))
    assert_close(hidden[0], wanted[0, :11], 2e-5, scale=3.0)
    with pytest.raises(ValueError, match="window keeps its last tokens"):
        model.init_cache(2, length, keep_ends=True)


@pytest.mark.parametrize("name", kept_of([*MEMORIES_OF_LAYERS], "rwkv7 exact"))
def test_any_memory_is_causal_and_streams(name):
    made, x = layer(mc.nn.MemoryAsContextMixer(MEMORIES_OF_LAYERS[name], WINDOW, 0)), inputs(22)
    assert all(leaf.size for leaf in jax.tree.leaves(nnx.state(made)))  # Orbax saves no others
    whole = nnx.jit(lambda layer, x: layer(x))
    y, broken = whole(made, x), whole(made, x.at[:, 13:].set(jnp.nan))
    assert_close(broken[:, :13], y[:, :13], 1e-6)
    assert np.isnan(broken[:, 13]).all()
    extend, cache, outputs = jax.jit(type(made).extend), made.init_cache(2, 22), []
    for begin in (0, 11):
        part, cache = extend(made, x[:, begin : begin + 11], cache)
        outputs.append(part)
    assert_close(jnp.concatenate(outputs, axis=1), y, 2e-5)


@pytest.mark.slow
def test_parts_of_a_model():
    mixers = (MIXER, mc.nn.AttentionMixer())
    config = mc.nn.LanguageModelConfig(17, 2, 8, HEADS, mixers=mixers, mlp_features=0)
    model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
    how: Any = dict(aggregation=mc.GRM(gate="uniform"), segmentation=mc.Constant(6))
    other = mc.nn.with_memory_caching(model, **how)
    memory = dataclasses.replace(MEMORY, **how)
    assert other.config.mixers[0] == dataclasses.replace(MIXER, memory=memory)
    gates = jax.eval_shape(model.gates, jnp.zeros((1, 12), jnp.int32))
    assert [None if x is None else x.shape for x in gates] == [(1, 12, 2, 3), None]


def test_refusals():
    with pytest.raises(ValueError, match="memory must be a mixer such as"):
        mc.nn.MemoryAsContextMixer(mc.memories.SSD())
    wrong: tuple[dict[str, Any], ...] = dict(window=0), dict(num_persistent=-1), dict(rope_base=0)
    for changes in wrong:
        with pytest.raises(ValueError, match=next(iter(changes))):
            mc.nn.MemoryAsContextMixer(MEMORY, **changes)
