"""Going back to any token by the tokens: a stream goes on as if the others had never come."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from memcache_jax.generation.apart import apart
from memcache_jax.generation.rewind_to import _read
from memcache_jax.nn import recurrent
from tests.cases import assert_close

VOCAB, ROWS, LENGTH, SEGMENT = 23, 3, 40, 8
CACHING = mc.nn.MemoryCachingMixer(mc.memories.GatedDeltaNet(), segmentation=mc.Constant(SEGMENT))


def model_of(*mixers, **options):
    config = mc.nn.LanguageModelConfig(VOCAB, 2, features=16, num_heads=2, mixers=mixers, **options)
    return mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))


def go_back(model, **options):
    """Reads pieces of a segment, returns to tokens near and far, and goes on in the same pieces."""
    graph, state = apart(model)
    extend = jax.jit(
        lambda tokens, cache, lengths: graph.merge(state).extend(tokens, cache, lengths)
    )
    tokens = np.random.default_rng(0).integers(VOCAB, size=(ROWS, LENGTH))
    cache = model.init_cache(ROWS, LENGTH, **options)
    taken, then = np.array([LENGTH, 17, 32]), np.array([13, 16, 30])
    begin = then // SEGMENT * SEGMENT
    wanted = model.init_cache(ROWS, LENGTH, **options)
    for at in range(0, LENGTH, SEGMENT):
        piece = tokens[:, at : at + SEGMENT]
        _, cache = extend(piece, cache, np.clip(taken - at, 0, SEGMENT))
        _, wanted = extend(piece, wanted, np.clip(begin - at, 0, SEGMENT))
    again = np.stack([row[at : at + SEGMENT - 1] for row, at in zip(tokens, begin, strict=True)])
    wanted = _read(
        state, jnp.asarray(again, jnp.int32), jnp.asarray(then - begin), wanted, graph=graph
    )
    got = mc.rewind_to(model, cache, tokens, then)
    assert got.position.tolist() == then.tolist()
    near = (taken - then) <= options.get("rewind", 0)
    following = np.stack([row[at : at + SEGMENT] for row, at in zip(tokens, then, strict=True)])
    counts = np.full(ROWS, SEGMENT)
    of_wanted, _ = extend(following, wanted, counts)
    hidden, _ = extend(following, got, counts)
    np.testing.assert_array_equal(hidden[~near], of_wanted[~near])
    assert_close(hidden, of_wanted, 1e-5)
    # And in one pass, from nothing.
    whole = model.hidden(jnp.asarray(tokens, jnp.int32))
    for row in range(ROWS):
        there = slice(then[row], min(LENGTH, then[row] + SEGMENT))
        assert_close(hidden[row, : there.stop - there.start], whole[row, there], 3e-5, scale=3.0)
    return tokens, cache


def test_near_and_far():
    """Rows by different numbers: two over segments' ends, one by no more than the cache rewinds."""
    model = model_of(CACHING, mc.nn.AttentionMixer())
    tokens, cache = go_back(model, keep_ends=True, rewind=2)
    known: Any = np.array([0, 1, 2])
    for given, position, message in (
        (tokens[:, :20], np.array([0, 1, 21]), "at least 21 of each row, got 20"),
        (tokens, np.array([0, 1, 33]), r"taken \[40, 17, 32\] tokens, cannot return to \[0, 1, 33"),
        (tokens, known[:2], r"position must be integers \(b,\) of the cache's 3 rows, got"),
        (tokens[:2], known, r"tokens must be integers \(b, t\) of the cache's 3 rows, got"),
        (tokens + VOCAB, known, "tokens must hold token ids from 0 to 22, got"),
    ):
        with pytest.raises(ValueError, match=message):
            mc.rewind_to(model, cache, given, position)
    with pytest.raises(ValueError, match="call it outside of jit"):
        jax.jit(lambda position: mc.rewind_to(model, cache, tokens, position))(known)


@pytest.mark.slow
def test_layers_that_shift_and_turn():
    keys = recurrent.Path(2, 4, shift=True, conv_width=3)
    shifted = recurrent.RecurrentMixer(
        *(mc.memories.RetNet(), keys, keys, recurrent.Path(2, 6, shift=True)),
        aggregation=mc.GRM(),
        segmentation=mc.Constant(SEGMENT),
    )
    go_back(model_of(shifted, mc.nn.ParallelMixer(CACHING, mc.nn.AttentionMixer())), keep_ends=True)


@pytest.mark.slow
def test_titans_without_convolutions():
    titans = mc.memories.Titans(chunk_size=4, expansion=1)
    go_back(
        model_of(mc.nn.MemoryCachingMixer(titans, segmentation=mc.Constant(SEGMENT))),
        keep_ends=True,
    )


@pytest.mark.slow
def test_rows_and_heads_of_a_mesh():
    model = model_of(CACHING, mc.nn.AttentionMixer())
    tokens = np.random.default_rng(0).integers(VOCAB, size=(4, LENGTH))
    then = np.array([13, 16, 30, LENGTH])

    def hidden(**options):
        cache = model.init_cache(4, LENGTH + 1, keep_ends=True, **options)
        _, cache = model.extend(jnp.asarray(tokens), cache)
        cache = mc.rewind_to(model, cache, tokens, then)
        assert cache.position.tolist() == then.tolist()
        return model.extend(jnp.asarray(tokens[:, :1]), cache)[0]

    wanted = hidden()
    with jax.set_mesh(jax.make_mesh((2, 2), ("rows", "heads"), devices=jax.devices()[:4])):
        assert_close(hidden(sharding=jax.P("rows", "heads")), wanted, 1e-5)


def test_what_is_not_kept():
    tokens, position = np.zeros((1, 20), int), np.array([3])

    def after(mixer, **options):
        model = model_of(mixer)
        cache = model.init_cache(1, LENGTH, **options)
        return model, cache.__class__(cache.layers, cache.states, cache.position + 20, LENGTH)

    for mixer, options, message in (
        (CACHING, dict(), r"last inputs of convolutions .* init_cache\(..., keep_ends=True\)"),
        (mc.nn.AttentionMixer(window=4), dict(), "attention to a window keeps its last tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            mc.rewind_to(*after(mixer, **options), tokens, position)
    for segmentation, message in (
        (mc.Adaptive(8, 16), "keep_ends needs segments with known ends"),
        (mc.Constant(8), "go on from whole states, and the cache merges them"),
    ):
        mixer = mc.nn.MemoryCachingMixer(
            mc.memories.SSD(), segmentation=segmentation, start="checkpoint"
        )
        merging: Any = dict(policy="merge", max_segments=2) if message.startswith("go") else {}
        with pytest.raises(ValueError, match=message):
            model_of(mixer).init_cache(1, LENGTH, keep_ends=True, **merging)
    model = model_of(mc.nn.MemoryCachingMixer(segmentation=mc.Logarithmic(64)))
    with pytest.raises(ValueError, match="buckets over several segments"):
        model.init_cache(1, 4 * 64, keep_ends=True)
