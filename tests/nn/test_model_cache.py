"""Caches of models: any split of a sequence gives the outputs of one pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from orbax.checkpoint import v1 as ocp

import memcache_jax as mc
from memcache_jax.nn import recurrent
from tests.cases import assert_close
from tests.covers import first_kept
from tests.nn.caches import (
    FEATURES,
    HEADS,
    HOST,
    LAYERS,
    LENGTH,
    caching,
    inputs,
    language_model,
    stream,
)


@pytest.mark.parametrize("placement", first_kept(1, ["host", "device"]))
def test_language_model(placement):
    mixers = dict(device=language_model().config.mixers, host=HOST)[placement]
    model = language_model(mixers=mixers, num_layers=2 * len(mixers))
    tokens = jax.random.randint(jax.random.key(1), (3, LENGTH), 0, 23)
    graph, state = nnx.split(model)
    extend = jax.jit(
        lambda tokens, cache, lengths: nnx.merge(graph, state).extend(tokens, cache, lengths),
        donate_argnums=1,
    )
    wanted = np.asarray(nnx.jit(lambda model, tokens: model.hidden(tokens))(model, tokens))
    cache = model.init_cache(3, LENGTH + 3, placement=placement)
    hidden, cache = stream(extend, tokens, cache, 3)
    assert_close(hidden, wanted, 2e-5)
    assert cache.position.tolist() == [LENGTH] * 3
    assert cache.nbytes == sum(a.nbytes for a in jax.tree.leaves(cache))

    # Two rows anew, in another order and one of them twice, in the program of the stream.
    cache, every = cache.reset(np.array([False, True, True])).take(np.array([2, 1])), np.full(3, 9)
    rows = np.array([1, 1, 2])
    hidden, cache = extend(tokens[rows, :9], cache.take(np.array([1, 1, 0])), every)
    assert_close(hidden, wanted[rows, :9], 2e-5)
    rows = rows[::-1]
    hidden, cache = extend(tokens[rows, 9:18], cache.take(np.array([2, 1, 0])), every)
    assert_close(hidden, wanted[rows, 9:18], 2e-5)


@pytest.mark.slow
def test_bounded_memory_of_a_model():
    model = language_model(mixers=(language_model().config.mixers[0],))
    cache = model.init_cache(1, max_segments=2, policy="drop_oldest", cache_dtype="int8")
    graph, state = nnx.split(model)
    extend = jax.jit(lambda tokens, cache: nnx.merge(graph, state).extend(tokens, cache))
    for _ in range(3):
        hidden, cache = extend(jnp.ones((1, 30), int), cache)
        assert jnp.isfinite(hidden).all()
    assert cache.position.tolist() == [90]


@pytest.mark.slow
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


@pytest.mark.slow
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
        ): r"made for 4 layers of 2 mixers, this model has 1 of 1",
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


def kinds_of_layers():
    """A model of everything that keeps a past: running sums, shifts, windows, latent rows."""
    keys = recurrent.Path(2, 4, shift=True, conv_width=3)
    shifted = recurrent.RecurrentMixer(
        *(mc.memories.RetNet(), keys, keys, recurrent.Path(2, 6, shift=True)),
        segmentation=mc.Constant(8),
    )
    mixers = (
        shifted,
        recurrent.mamba3(HEADS, 4, state_dim=4, segmentation=mc.Constant(4)),
        mc.nn.ParallelMixer(
            mc.nn.AttentionMixer(window=6),
            mc.nn.MemoryCachingMixer(mc.memories.GatedDeltaNet(), segmentation=mc.Constant(8)),
        ),
        mc.nn.LatentAttentionMixer(HEADS, key_dim=4, shared_dim=4, value_dim=4, rank=8),
        mc.nn.AttentionMixer(),
    )
    blocks = tuple(mc.nn.BlockConfig(mixer, mc.nn.ChannelMix(12)) for mixer in mixers[:2])
    blocks += tuple(mc.nn.BlockConfig(mixer) for mixer in 2 * mixers[2:])
    return mc.nn.LanguageModel(
        mc.nn.LanguageModelConfig(23, len(blocks), FEATURES, HEADS, blocks=blocks),
        rngs=nnx.Rngs(0),
    )


@pytest.mark.slow
def test_models_go_back_in_any_order_of_calls():
    model, rows, most, steps = kinds_of_layers(), 3, 5, 120
    graph, state = nnx.split(model)
    extend = jax.jit(
        lambda tokens, cache, lengths: nnx.merge(graph, state).extend(tokens, cache, lengths),
        donate_argnums=1,
    )
    rewind = jax.jit(lambda cache, tokens: cache.rewind(tokens), donate_argnums=0)
    whole = jax.jit(lambda tokens: nnx.merge(graph, state).hidden(tokens))
    rng, cache = np.random.default_rng(0), model.init_cache(rows, LENGTH, rewind=most)
    told: list[list[int]] = [[] for _ in range(rows)]
    back = np.zeros(rows, int)
    for step in range(steps):
        kind = rng.choice(["extend", "rewind", "reset", "take"], p=[0.55, 0.35, 0.05, 0.05])
        if kind == "extend":
            new = rng.integers(23, size=(rows, 7))
            room = [min(7, LENGTH - len(row)) for row in told]
            lengths = np.array([rng.integers(0, least + 1) for least in room])
            hidden, cache = extend(jnp.asarray(new), cache, jnp.asarray(lengths))
            begins = [len(row) for row in told]
            for row, ids, count in zip(told, new.tolist(), lengths, strict=True):
                row += ids[:count]
            back = np.minimum(back + lengths, most)
            padded = np.array([row + [0] * (LENGTH - len(row)) for row in told])
            wanted = np.asarray(whole(jnp.asarray(padded)))
            for row, (begin, count) in enumerate(zip(begins, lengths, strict=True)):
                got = np.asarray(hidden[row, :count])
                assert_close(got, wanted[row, begin : begin + count], 3e-5, scale=3.0)
        elif kind == "rewind":
            taken = rng.integers(0, back + 1)
            cache = rewind(cache, jnp.asarray(taken))
            told = [row[: len(row) - count] for row, count in zip(told, taken, strict=True)]
            back -= taken
        elif kind == "reset":
            marks = np.arange(rows) == step % rows
            cache, back = cache.reset(marks), np.where(marks, 0, back)
            told[step % rows] = []
        else:
            order = rng.integers(rows, size=rows)
            cache, back = cache.take(order), back[order]
            told = [list(told[row]) for row in order]
        np.testing.assert_array_equal(cache.rewindable, back)
        assert cache.position.tolist() == [len(row) for row in told]


@pytest.mark.slow
def test_what_does_not_go_back():
    model = language_model(mixers=(mc.nn.AttentionMixer(window=6),), num_layers=1)
    cache = model.init_cache(1, rewind=2)
    assert cache.layers[0].key is None
    assert cache.states[0][0].shape[3] == 5 + 2
    with pytest.raises(ValueError, match="rewind must be at least 0, got -1"):
        model.init_cache(1, rewind=-1)
    with pytest.raises(ValueError, match="does not go back: make it with init_cache"):
        model.init_cache(1).rewind(np.array([1]))


@pytest.mark.parametrize(
    "kind", first_kept(1, dict(explicit=AxisType.Explicit, auto=AxisType.Auto))
)
def test_models_go_back_on_a_mesh(kind):
    mixers = (*language_model().config.mixers, mc.nn.AttentionMixer())
    model = language_model(mixers=mixers, num_layers=3)
    tokens = jax.random.randint(jax.random.key(0), (4, 20), 0, 23)
    graph, state = nnx.split(model)

    def run(tokens, cache):
        extend = jax.jit(lambda tokens, cache: nnx.merge(graph, state).extend(tokens, cache))
        _, cache = extend(tokens[:, :10], cache)
        return extend(tokens[:, 10:], cache.rewind(np.array([3, 0, 2, 1])))

    wanted, _ = run(tokens, model.init_cache(4, 40, rewind=3))
    mesh = jax.make_mesh((2, 2), ("rows", "model"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        tokens = jax.device_put(tokens, jax.NamedSharding(mesh, jax.P("rows")))
        cache = model.init_cache(4, 40, rewind=3, sharding=jax.P("rows", "model"))
        hidden, cache = run(tokens, cache)
    assert_close(hidden, wanted, 2e-5)
    assert cache.position.sharding.spec == jax.P("rows")
