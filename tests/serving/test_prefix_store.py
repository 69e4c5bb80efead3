"""The store of prefixes: what it finds, what it costs, and that nothing it returns is wrong."""

import functools
import os
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from tests.covers import first_kept
from tests.serving.models import LENGTH, MIXERS, VOCAB, ids


@functools.cache
def model():
    mixers = (*MIXERS, mc.nn.AttentionMixer())
    config = mc.nn.LanguageModelConfig(VOCAB, 2, features=16, num_heads=2, mixers=mixers)
    return mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))


@functools.cache
def empty(**options: Any):
    return model().init_cache(1, LENGTH, **options)


def same(one, other):
    return all(
        np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (one, other)), strict=True)
    )


def test_prompts_that_share_a_beginning():
    told, cold = ids(), mc.PrefixStore(10**8)
    wanted, cache, known = cold.prefill(model(), told, empty(), every=16)
    assert known == 0
    assert cold.match(told)[1] == 32
    assert cold.match(told[:16]) == (None, 0)  # the last token is left to be read
    assert cold.match(ids(1)) == (None, 0)
    assert len(cold) == 3
    # Three caches have the states, keys and values of each other's segments but once.
    alone = mc.PrefixStore(10**8)
    assert alone.insert(told, cache)
    assert cold.nbytes < 2 * alone.nbytes

    store = mc.PrefixStore(10**8)
    other = np.append(told[:36], ids(2, 10))
    assert store.prefill(model(), other, empty(), every=16)[2] == 0
    logits, again, known = store.prefill(model(), told, empty(), every=16)
    assert known == 32
    np.testing.assert_array_equal(logits, wanted)  # bit for bit
    assert same(cache, again)
    # What it returns is the caller's, and calls may donate it.
    logits, cache, known = store.prefill(model(), np.append(told, ids(3, 5)), empty(), every=16)
    assert known == 40
    whole = model()(jnp.asarray(np.append(told, ids(3, 5)))[None])[0, -1]
    np.testing.assert_allclose(logits, whole, rtol=0, atol=2e-5)
    assert same(store.match(np.append(told, 1))[0], again)


@pytest.mark.slow
def test_the_oldest_go_first(tmp_path):
    prompts = [ids(seed, 30) for seed in range(3)]
    large, sizes, cache = mc.PrefixStore(10**8), [], empty()
    for prompt in prompts:
        _, cache, _ = large.prefill(model(), prompt, empty(), every=60)
        sizes.append(large.nbytes)
    store = mc.PrefixStore(sizes[2] - 1)
    for prompt in prompts[:2]:
        store.prefill(model(), prompt, empty(), every=60)
    assert store.match(np.append(prompts[0], 1))[1] == 30  # now used last
    store.prefill(model(), prompts[2], empty(), every=60)
    assert store.nbytes <= store.max_bytes
    assert [store.match(np.append(prompt, 1))[1] for prompt in prompts] == [30, 0, 30]
    assert not mc.PrefixStore(100).insert(prompts[2], cache)

    store.save(tmp_path / "store")
    read = mc.PrefixStore.load(tmp_path / "store", empty(), 10**8)
    assert (len(read), read.nbytes) == (len(store), store.nbytes)
    assert same(read.match(np.append(prompts[0], 1))[0], store.match(np.append(prompts[0], 1))[0])
    assert len(mc.PrefixStore.load(tmp_path / "store", empty(), sizes[0])) == 1
    with pytest.raises(ValueError, match="must be made alike"):
        mc.PrefixStore.load(tmp_path / "store", model().init_cache(1, LENGTH + 1), 10**8)
    (tmp_path / "again").write_bytes((tmp_path / "store").read_bytes())
    (tmp_path / "store").write_bytes(b"PK" + bytes(100))
    with pytest.raises(ValueError, match="damaged, or no file of a PrefixStore"):
        mc.PrefixStore.load(tmp_path / "store", empty(), 10**8)
    whole = (tmp_path / "again").read_bytes()
    (tmp_path / "short").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged, or no file of a PrefixStore"):
        mc.PrefixStore.load(tmp_path / "short", empty(), 10**8)
    empty_store = mc.PrefixStore(10)
    empty_store.save(tmp_path / "empty")
    assert len(mc.PrefixStore.load(tmp_path / "empty", empty(), 10)) == 0


@pytest.mark.slow
def test_threads():
    """Each thread finds its own prompts, whatever the others insert and drive out."""
    one = mc.PrefixStore(10**8)
    made = [one.prefill(model(), ids(seed, 30), empty(), every=60)[1] for seed in range(4)]
    store, wrong = mc.PrefixStore(2 * one.nbytes // 4), []

    def work(seed):
        for _ in range(25):
            store.insert(ids(seed, 30), made[seed])
            cache, known = store.match(np.append(ids(seed, 30), 1))
            if known and not same(cache, made[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert 0 < store.nbytes <= store.max_bytes


@pytest.mark.parametrize(
    "options",
    first_kept(
        1,
        dict(
            drop_oldest=dict(
                rewind=3, cache_dtype="bfloat16", max_segments=2, policy="drop_oldest"
            ),
            merge=dict(cache_dtype="int8", max_segments=2, policy="merge"),
        ),
    ),
)
def test_bounded_caches(options):
    """States that a policy has dropped or merged since are there where they were found."""
    start, store = model().init_cache(1, LENGTH, **options), mc.PrefixStore(10**8)
    told = ids(5, 57)
    wanted, cache, _ = store.prefill(model(), told, start, every=8)
    for count in (9, 26, 41):
        logits, again, known = store.prefill(model(), np.append(told[:count], 3), start, every=8)
        assert known == count // 8 * 8
        assert again.position.tolist() == [count + 1]
    logits, again, known = store.prefill(model(), told, start, every=8)
    assert known == 56
    np.testing.assert_array_equal(logits, wanted)
    assert same(cache, again)


@pytest.mark.slow
def test_states_on_the_host():
    mixers = (
        mc.nn.MemoryCachingMixer(
            memory=mc.memories.SSD(), aggregation=mc.SSC(top_k=2), segmentation=mc.Constant(8)
        ),
    )
    config = mc.nn.LanguageModelConfig(VOCAB, 2, features=16, num_heads=2, mixers=mixers)
    model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
    start, store = model.init_cache(1, LENGTH, placement="host"), mc.PrefixStore(10**8)
    wanted, cache, _ = store.prefill(model, ids(), start)
    logits, again, known = store.prefill(model, ids(), start)
    assert known == 32
    np.testing.assert_array_equal(logits, wanted)
    for x, y in zip(*map(jax.tree.leaves, (cache, again)), strict=True):
        assert x.sharding.memory_kind == y.sharding.memory_kind


@pytest.mark.usefixtures("unchecked")
def test_what_is_refused(tmp_path):
    store: Any = mc.PrefixStore(10**8)
    for call, message in {
        lambda: mc.PrefixStore(0): "max_bytes must be at least 1, got 0",
        lambda: store.insert([1, 2], empty()): r"after the 2 tokens; it has taken \[0\]",
        lambda: store.insert([], model().init_cache(2, LENGTH)): r"one row.*taken \[0, 0\]",
        lambda: store.insert([1], empty().layers[0]): "cache must be the cache of a LanguageModel",
        lambda: store.match([[1, 2]]): r"tokens must be integers \(t,\), got int64 \(1, 2\)",
        lambda: store.match([2**32]): "token ids from 0 to 2147483647, got 4294967296",
        lambda: store.match([0.5]): r"tokens must be integers \(t,\), got float64",
        lambda: store.prefill(model(), [], empty()): "give at least one token",
        lambda: store.prefill(model(), [VOCAB], empty()): "token ids from 0 to 22, got 23",
        lambda: store.prefill(model(), [1] * 61, empty()): "holds 60 tokens in a row and would",
        lambda: store.prefill(model(), [1], empty(), every=0): "every must be at least 1",
        lambda: store.prefill(None, [1], empty()): "model must be an mc.nn.LanguageModel",
        lambda: store.prefill(model(), [1], None): "empty must be the cache of a LanguageModel",
        lambda: store.load(tmp_path / "none", None, 9): "like must be the cache of a Language",
        lambda: store.load(tmp_path / "none", empty(), 9): "there is no file .*none",
        lambda: store.load(3, empty(), 9): "path must be a path, got 3",
        lambda: store.save(b"bytes"): "path must be a path, got b'bytes'",
        lambda: store.save(tmp_path): "path must be that of a file, new or existing",
        lambda: store.save(os.devnull): "path must be that of a file, new or existing",
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    store.insert([], empty())
    store.save(tmp_path / "store")
    other = bytearray((tmp_path / "store").read_bytes())
    other[other.find(b"PK\x01\x02") + 10] ^= 64  # how the archive is packed
    (tmp_path / "store").write_bytes(other)
    with pytest.raises(ValueError, match=r"is damaged, .* compression method"):
        store.load(tmp_path / "store", empty(), 10**8)
    with pytest.raises(ValueError, match="must be made alike"):
        store.insert([], model().init_cache(1, LENGTH + 1))
