"""Caches of layers and models: any split of a sequence gives the outputs of one pass."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

import memcache_jax as mc
from tests.cases import assert_close

LENGTH, FEATURES, HEADS = 37, 16, 2
LAYERS = {
    "grm": lambda rngs: caching(rngs, mc.memories.Titans(chunk_size=4), mc.GRM()),
    "query": lambda rngs: caching(
        rngs, mc.memories.GatedDeltaNet(), mc.SSC(top_k=2), connector="query"
    ),
    "position": lambda rngs: caching(
        rngs, mc.memories.RetNet(), mc.GRM(gate="position"), mc.Logarithmic(4)
    ),
    "attention": lambda rngs: mc.nn.Attention(FEATURES, HEADS, rngs=rngs),
    "window": lambda rngs: mc.nn.Attention(FEATURES, HEADS, window=5, rngs=rngs),
    "window of one": lambda rngs: mc.nn.Attention(FEATURES, HEADS, window=1, rngs=rngs),
}


HOST = (
    mc.nn.MemoryCachingMixer(
        memory=mc.memories.SSD(), aggregation=mc.SSC(top_k=2), segmentation=mc.Constant(8)
    ),
)


def caching(rngs, memory, aggregation, segmentation: Any = None, **options):
    return mc.nn.MemoryCaching(
        FEATURES,
        HEADS,
        memory=memory,
        aggregation=aggregation,
        segmentation=segmentation or mc.Constant(8),
        rngs=rngs,
        **options,
    )


def inputs(batch=3):
    return jax.random.normal(jax.random.key(0), (batch, LENGTH, FEATURES))


def language_model(**changes):
    config: dict[str, Any] = dict(
        vocab_size=23,
        num_layers=4,
        features=FEATURES,
        num_heads=HEADS,
        mixers=(
            mc.nn.MemoryCachingMixer(
                memory=mc.memories.GatedDeltaNet(), segmentation=mc.Constant(8)
            ),
            mc.nn.AttentionMixer(window=6),
        ),
    )
    return mc.nn.LanguageModel(mc.nn.LanguageModelConfig(**config | changes), rngs=nnx.Rngs(0))


def stream(step, rows, cache, batch):
    """Outputs (b, LENGTH, ...) of ragged calls, each row at its own pace."""
    position = np.zeros(batch, int)
    outputs: list[list] = [[] for _ in range(batch)]
    while (position < LENGTH).any():
        lengths = np.minimum(np.array([1, 9, 6])[:batch], LENGTH - position)
        there = np.minimum(position[:, None] + np.arange(9)[None], LENGTH - 1)
        picked = jnp.stack([rows[b, there[b]] for b in range(batch)])
        y, cache = step(picked, cache, jnp.asarray(lengths))
        for b in range(batch):
            outputs[b].append(np.asarray(y[b, : lengths[b]]))
        position += lengths
    return np.stack([np.concatenate(row) for row in outputs]), cache


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    layer, x = LAYERS[name](nnx.Rngs(0)), inputs()
    graph, state = nnx.split(layer)
    step = jax.jit(
        lambda x, cache, lengths: nnx.merge(graph, state).extend(x, cache, lengths),
        donate_argnums=1,
    )
    y, _ = stream(step, x, layer.init_cache(3, LENGTH), 3)
    assert_close(y, nnx.jit(lambda layer, x: layer(x))(layer, x), 2e-5)


def test_call_with_a_cache():
    layer = caching(nnx.Rngs(0), mc.memories.LinearAttention(), mc.GRM())
    x, outputs = inputs(), []
    cache: Any = layer.init_cache(3, max_length=LENGTH)
    for begin, end in ((0, 30), (30, LENGTH)):
        y, cache = layer(x[:, begin:end], cache=cache)
        outputs.append(y)
    assert_close(jnp.concatenate(outputs, axis=1), layer(x), 2e-5)
    assert cache.nbytes == sum(a.nbytes for a in jax.tree.leaves(cache))
    with pytest.raises(ValueError, match="give no document_ids"):
        layer(x, jnp.zeros(x.shape[:2], int), cache=cache)


def test_initial_weights_are_trained_where_the_cache_is_a_constant():
    layer = caching(nnx.Rngs(0), mc.memories.Titans(chunk_size=2, depth=1), mc.Residual())

    @nnx.jit
    def gradients(layer, x, cache):
        def loss(layer):
            y, after = layer.extend(x, cache)
            return (y**2).sum(), after

        return nnx.grad(loss, has_aux=True)(layer)

    # Segments have 8 tokens: the first piece begins one and the third one does, not the second.
    cache, seen = layer.init_cache(1, 9), []
    for begin in (0, 3, 6):
        slopes, cache = gradients(layer, inputs(1)[:, begin : begin + 3], cache)
        seen.append(bool(jnp.any(slopes.weights.W[...])))
    assert seen == [True, False, True]


@pytest.mark.parametrize("placement", ["device", "host"])
def test_language_model(placement):
    mixers = dict(device=language_model().config.mixers, host=HOST)[placement]
    model = language_model(mixers=mixers, num_layers=2 * len(mixers))
    tokens = jax.random.randint(jax.random.key(1), (3, LENGTH), 0, 23)
    graph, state = nnx.split(model)
    extend = jax.jit(
        lambda tokens, cache, lengths=None: nnx.merge(graph, state).extend(tokens, cache, lengths),
        donate_argnums=1,
    )
    wanted = np.asarray(nnx.jit(lambda model, tokens: model.hidden(tokens))(model, tokens))
    cache = model.init_cache(3, LENGTH + 3, placement=placement)
    hidden, cache = stream(extend, tokens, cache, 3)
    assert_close(hidden, wanted, 2e-5)
    assert cache.position.tolist() == [LENGTH] * 3
    assert cache.nbytes == sum(a.nbytes for a in jax.tree.leaves(cache))

    cache = cache.reset(np.array([False, True, True])).take(np.array([2, 1]))
    hidden, cache = extend(tokens[1:, :20], cache)
    assert_close(hidden, wanted[1:, :20], 2e-5)
    cache = cache.take(np.array([1, 1, 0]))
    hidden, cache = extend(tokens[np.array([2, 2, 1]), 20:], cache)
    assert_close(hidden, wanted[np.array([2, 2, 1]), 20:], 2e-5)


def test_bounded_memory_of_a_model():
    model = language_model(mixers=(language_model().config.mixers[0],))
    cache = model.init_cache(1, max_segments=2, policy="drop_oldest", cache_dtype="int8")
    graph, state = nnx.split(model)
    extend = jax.jit(lambda tokens, cache: nnx.merge(graph, state).extend(tokens, cache))
    for _ in range(3):
        hidden, cache = extend(jnp.ones((1, 30), int), cache)
        assert jnp.isfinite(hidden).all()
    assert cache.position.tolist() == [90]


@pytest.mark.parametrize(
    ("options", "mixers"),
    [
        (dict(cache_dtype="int8"), language_model().config.mixers),
        (dict(placement="host"), HOST),
    ],
    ids=["int8", "host"],
)
def test_a_cache_is_saved_and_restored(tmp_path, options, mixers):
    model, tokens = language_model(mixers=mixers), jnp.ones((1, 20), int)
    graph, state = nnx.split(model)
    extend = jax.jit(lambda tokens, cache: nnx.merge(graph, state).extend(tokens, cache))
    _, cache = extend(tokens, model.init_cache(1, 60, **options))
    ocp.save(tmp_path / "cache", cache)
    mesh = jax.make_mesh((1,), ("x",))

    def struct(x):
        kind = x.sharding.memory_kind
        sharding = jax.sharding.NamedSharding(mesh, jax.P(), memory_kind=kind)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    empty = jax.tree.map(struct, model.init_cache(1, 60, **options))
    restored = ocp.load(tmp_path / "cache", empty)
    for got, wanted in zip(*map(jax.tree.leaves, (restored, cache)), strict=True):
        np.testing.assert_array_equal(got, wanted)
        assert got.dtype == wanted.dtype
        assert got.sharding.memory_kind == wanted.sharding.memory_kind
    assert_close(extend(tokens, restored)[0], extend(tokens, cache)[0], 1e-5)


def test_bytes_of_a_cache():
    cache = language_model().init_cache(2, 40)
    parts = mc.nn.cache_bytes(cache)
    assert sum(parts.values()) == cache.nbytes - cache.position.nbytes - 2 * 2 * 2 * 4
    # 2 layers, 2 rows, 2 heads of dimension 8: 4 segments, and a window of 6.
    assert parts["cached states"] == 2 * 2 * 2 * 4 * 8 * 8 * 4
    assert parts["keys and values"] == 2 * 2 * 2 * 5 * 2 * 8 * 4
    window = LAYERS["window"](nnx.Rngs(0)).init_cache(3)
    assert window.nbytes == 3 * (2 * 4 * 16 + 1) * 4  # keys, values and the position
    assert parts["convolution tails"] == 2 * 2 * 3 * 3 * 16 * 4


@pytest.mark.usefixtures("unchecked")
def test_errors():
    linear = mc.nn.MemoryCachingMixer(memory=mc.memories.LinearAttention())
    model, tokens = language_model(mixers=(linear,), num_layers=1), jnp.zeros((2, 9), int)
    cache = model.init_cache(2, max_length=12)
    _, cache = model.extend(tokens, cache)
    for call, message in {
        lambda: model.extend(tokens, cache): "holds 12 tokens in a row and would have 18",
        lambda: model.extend(tokens[:1], cache): "the cache has 2 rows, got tokens of 1",
        lambda: model.extend(tokens[:, :0], cache): "give at least one token",
        lambda: model.extend(tokens + 0.5, cache): "tokens must be integers",
        lambda: model.extend(tokens, cache.layers[0]): "a LanguageModel's, got LayerCache",
        lambda: model.extend(
            tokens, language_model().init_cache(2, 12)
        ): r"\(num_layers, mixers\) = \(4, 2\), this model has \(1, 1\)",
        lambda: model.init_cache(0, 10): "batch_size must be at least 1",
        lambda: model.init_cache(2, 10, segments=3): r"no options \['segments'\]",
        lambda: language_model(mixers=(mc.nn.AttentionMixer(),)).init_cache(2): "give max_length",
        lambda: model.init_cache(2, 10, policy="merge"): "needs max_segments",
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    bounded = model.init_cache(2, max_segments=0)
    with pytest.raises(ValueError, match="holds 256 tokens in a row and would have 300"):
        model.extend(jnp.zeros((2, 300), int), bounded)
    model.extend(tokens[:, :3], cache)  # which is as good as before

    one, other = (caching(nnx.Rngs(0), mc.memories.RetNet(), k) for k in (mc.GRM(), mc.SSC()))
    with pytest.raises(ValueError, match=r"made for aggregation=GRM\(.*, got SSC"):
        other.extend(inputs(), one.init_cache(3, 10))
    window = LAYERS["window"](nnx.Rngs(0))
    with pytest.raises(ValueError, match="must hold the last 4 tokens for window=5, it holds 0"):
        window.extend(inputs(), LAYERS["window of one"](nnx.Rngs(0)).init_cache(3))
    with pytest.raises(ValueError, match="for another layer: AttentionCache"):
        one.extend(inputs(), window.init_cache(3))
    with pytest.raises(ValueError, match=r"a cache has no options \['segments'\]"):
        window.init_cache(3, segments=2)
    wide = mc.nn.Attention(FEATURES, 4, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"\(num_heads, head_dim\) = \(4, 4\), this layer has \(2, 8\)"
    ):
        LAYERS["attention"](nnx.Rngs(0)).extend(inputs(), wide.init_cache(3, 10))
