"""Attention with grouped heads, norms, a gate and partial rotary positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from memcache_jax.nn.rotary import rotate
from tests.cases import assert_close

MIXERS = {
    "all": mc.nn.GroupedAttentionMixer(
        4, 2, 8, rope_fraction=0.5, norm=mc.nn.Norm(offset=1.0), gate=True, scale=0.3
    ),
    "window": mc.nn.GroupedAttentionMixer(
        4, 1, 8, rope_base=None, norm=mc.nn.Norm(), norm_over="all", window=5, use_bias=True
    ),
}


def inputs(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def token_by_token(layer, x):
    """The equation, for one row."""
    mixer, (length, _) = layer.mixer, x.shape
    query, key, value = (
        linear(x).reshape(length, -1, 8) for linear in (layer.query, layer.key, layer.value)
    )
    if mixer.norm_over == "all":
        query, key = (
            norm(rows.reshape(length, -1)).reshape(rows.shape)
            for norm, rows in ((layer.query_norm, query), (layer.key_norm, key))
        )
    else:
        query, key = layer.query_norm(query), layer.key_norm(key)
    if mixer.rope_base is not None:
        turned = (rotate(rows[None, ..., :4], mixer.rope_base)[0] for rows in (query, key))
        query, key = (
            jnp.concatenate([t, rows[..., 4:]], axis=-1)
            for t, rows in zip(turned, (query, key), strict=True)
        )
    key, value = (jnp.repeat(rows, 4 // mixer.num_kv_heads, axis=1) for rows in (key, value))
    scores = jnp.einsum("thk,shk->hts", query, key) * (mixer.scale or 8**-0.5)
    ago = np.arange(length)[:, None] - np.arange(length)[None]
    seen = jnp.asarray((ago >= 0) & (ago < (mixer.window or length)))[None]
    y = jnp.einsum("hts,shk->thk", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)), value)
    y = y.reshape(length, -1)
    return layer.out(y * jax.nn.sigmoid(layer.gate(x)) if mixer.gate else y)


@pytest.mark.parametrize("name", MIXERS)
def test_it_is_the_equation_whole_and_in_a_stream(name):
    layer, x = MIXERS[name].build(6, rngs=nnx.Rngs(0)), inputs(2, 12, 6)
    cache = layer.init_cache(2, 12)
    assert cache.key.shape[1] == layer.num_kv_heads

    @nnx.jit
    def run(layer, x, cache):
        wanted = jnp.stack([token_by_token(layer, row) for row in x])
        pieces = []
        for piece in (x[:, :7], x[:, 7:8], x[:, 8:]):
            y, cache = layer.extend(piece, cache)
            pieces.append(y)
        return wanted, layer(x), jnp.concatenate(pieces, axis=1)

    wanted, whole, stream = run(layer, x, cache)
    assert_close(whole, wanted, 1e-5)
    assert_close(stream, wanted, 1e-5)


@pytest.mark.slow
def test_a_bad_key_spoils_the_heads_that_read_it_alone():
    layer, x = MIXERS["all"].build(6, rngs=nnx.Rngs(0)), inputs(1, 6, 6)
    y = jax.jit(layer)(x.at[0, 3].set(jnp.nan))
    np.testing.assert_array_equal(np.isnan(y).all(axis=-1)[0], [False] * 3 + [True] * 3)
    assert np.isfinite(y[0, :3]).all()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_kv_heads=3), "num_kv_heads=3 must divide num_heads=4"),
        (dict(rope_fraction=0.4), "even number of channels .*, got 3"),
        (dict(norm_over="heads"), "norm_over"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        mc.nn.GroupedAttentionMixer(**dict(num_heads=4, num_kv_heads=2, head_dim=8) | options)
