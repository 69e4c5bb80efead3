"""Attention to a window in blocks: as all at once, in memory that grows as the tokens do."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import memcache_jax as mc
from memcache_jax.nn.rotary import rotate
from memcache_jax.nn.windows import block_size
from tests.cases import assert_close, value_and_vjp
from tests.covers import first_kept, kept_of

WINDOW, LENGTH = 6, 150  # two blocks, and a part of a third
DOCUMENTS = np.arange(LENGTH)[None] // np.array([[40], [33]])
PADDED = np.random.default_rng(0).random((2, 1, LENGTH, LENGTH)) < 0.8
PADDED |= np.eye(LENGTH, dtype=bool)


def layer(window=WINDOW):
    return mc.nn.Attention(8, 2, window=window, rngs=nnx.Rngs(0))


def tokens(length=LENGTH):
    return jax.random.normal(jax.random.key(0), (2, length, 8))


def equation(attention, x, seen):
    """All scores at once."""
    rows = (f(x).reshape(*x.shape[:2], 2, 4) for f in (attention.query, attention.key))
    query, key = (rotate(row, attention.rope_base) for row in rows)
    value = attention.value(x).reshape(key.shape)
    scores = jnp.einsum("bthk,bshk->bhts", query, key) / 2
    ago = np.subtract.outer(np.arange(x.shape[1]), np.arange(x.shape[1]))
    seen = seen & (ago >= 0) & (ago < attention.window)
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    return attention.out(jnp.einsum("bhts,bshk->bthk", weights, value).reshape(x.shape))


def test_blocks_are_for_many_tokens():
    assert [block_size(6, length) for length in (1, 128, 129)] == [1, 128, 64]
    assert [block_size(100, length) for length in (200, 201)] == [200, 100]


@pytest.mark.parametrize(
    "of", kept_of(["window", "documents", "mask"], "documents", fast=["window"])
)
def test_values_and_gradients_are_those_of_all_at_once(of):
    attention, x = layer(), tokens()
    same = (DOCUMENTS[:, :, None] == DOCUMENTS[:, None])[:, None]
    cases: dict[str, tuple[dict[str, Any], np.ndarray]] = dict(
        window=({}, np.ones((1, 1, 1, 1), bool)),
        documents=(dict(document_ids=jnp.asarray(DOCUMENTS)), same),
        mask=(dict(mask=PADDED & np.tri(LENGTH, dtype=bool)), PADDED),
    )
    call, seen = cases[of]
    got = value_and_vjp(lambda x: attention(x, **call), x)
    wanted = value_and_vjp(lambda x: equation(attention, x, seen), x)
    assert_close(got, wanted, 1e-5)


@pytest.mark.parametrize("window", first_kept(1, [100, 1]))
def test_a_stream_takes_many_tokens_at_once(window):
    attention, x = layer(window), tokens(2 * LENGTH)
    extend = jax.jit(attention.extend)
    first, cache = extend(x[:, :3], attention.init_cache(2), jnp.array([3, 1]))
    rest = jnp.stack([x[0, 3:], x[1, 1:-2]])  # of the first row, the last two do not count
    y, cache = extend(rest, cache, jnp.array([2 * LENGTH - 5, 2 * LENGTH - 3]))
    last, _ = extend(x[:, -2:], cache, jnp.array([2, 2]))
    wanted = jax.jit(attention)(x)
    assert_close(first[0], wanted[0, :3], 1e-5)
    assert_close(y[0, :-2], wanted[0, 3:-2], 1e-5)
    assert_close(y[1], wanted[1, 1:-2], 1e-5)
    assert_close(last, wanted[:, -2:], 1e-5)


@pytest.mark.parametrize("window", first_kept(1, [WINDOW, 100]))
def test_parts_of_a_sequence_give_the_whole(window):
    attention, x = layer(window), tokens(2 * LENGTH)
    ids = jnp.asarray(np.tile(DOCUMENTS, 2))
    mask = jnp.asarray(np.tile(PADDED[:1], (1, 1, 2, 2)) & np.tri(2 * LENGTH, dtype=bool))
    run = jax.jit(lambda x: [attention(x), attention(x, ids), attention(x, mask=mask)])
    wanted = run(x)
    mesh = jax.make_mesh((2,), ("time",), (AxisType.Explicit,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        assert_close(run(jax.device_put(x, NamedSharding(mesh, P(None, "time")))), wanted, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("streams", [False, True])
def test_memory_grows_as_the_tokens_do(streams):
    attention = layer()

    def temporaries(length):
        run = attention.extend if streams else attention
        x = jax.ShapeDtypeStruct((1, length, 8), jnp.float32)
        given = (x, attention.init_cache(1)) if streams else (x,)
        compiled: Any = jax.jit(run).lower(*given).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = map(temporaries, (512, 1024))
    assert large < 2.1 * small
