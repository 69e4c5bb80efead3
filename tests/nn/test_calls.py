"""Calls as hosts make them give each document the outputs that it has alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from tests.cases import assert_close
from tests.covers import kept_of, product
from tests.nn.caches import language_model
from tests.nn.hosts import (
    DOCUMENTS,
    LAYERS,
    LENGTH,
    MASKS,
    POSITIONS,
    SEGMENTS,
    alone,
    inputs,
    picked,
    separate,
)
from tests.nn.layer import make, tokens

CALLS: dict[str, Any] = (
    {f"positions, {name}": dict(positions=positions) for name, positions in POSITIONS.items()}
    | {f"mask {name}": dict(mask=mask) for name, mask in MASKS.items()}
    | {
        "segments and positions": dict(
            segment_ids=SEGMENTS, positions=POSITIONS["zeros and repeats"]
        ),
        # As MaxText: positions go on in the padding.
        "segments and a causal mask": dict(segment_ids=SEGMENTS, mask=np.tri(LENGTH)),
        "all": dict(
            segment_ids=SEGMENTS,
            positions=POSITIONS["negative"],
            mask=MASKS["of both"],
            deterministic=False,
        ),
        "padding alone, made causal": dict(
            mask=(SEGMENTS > 0)[:, None, None, :], segment_ids=SEGMENTS, is_causal=True
        ),
    }
)
FLAGS = ("deterministic", "is_causal")


FEW = ("positions, zeros and repeats", "mask of keys")


def answers(layer, x, calls):
    return {name: layer(x, **call) for name, call in calls.items()}


@pytest.mark.parametrize(
    ("name", "traced"), product([*LAYERS], dict(known=False, traced=True), turn=0)
)
def test_documents_come_out_as_alone(name, traced):
    layer, x = LAYERS[name](nnx.Rngs(0)), inputs()
    every = name == "attention" or (name == "ssd, grm" and not traced)
    calls = CALLS if every else {call: CALLS[call] for call in FEW}
    flags = {n: {k: v for k, v in call.items() if k in FLAGS} for n, call in calls.items()}
    arrays = {n: {k: v for k, v in call.items() if k not in FLAGS} for n, call in calls.items()}

    @jax.jit
    def run(layer, x, arrays):
        own = {n: (arrays if traced else calls)[n] | flags[n] for n in calls}
        return layer(alone(x)), answers(layer, x, own)

    wanted, got = run(layer, x, arrays)
    for call, y in got.items():
        # Left padding that only ids tell of is a document as any: the next begins in a segment.
        first = call == "segments and a causal mask"
        assert_close(picked(y)[first:], separate(wanted)[first:], 1e-5)
        assert np.isfinite(y).all(), call


@pytest.mark.parametrize("name", kept_of(["titans, grm", "attention"], "titans, grm"))
def test_segment_ids_are_document_ids(name):
    layer = LAYERS[name](nnx.Rngs(0))

    @jax.jit
    def run(x, ids):
        return layer(x, ids), layer(x, segment_ids=SEGMENTS), layer(alone(x))

    one, other, whole = run(inputs(), SEGMENTS)
    assert_close(other, one, 1e-6)
    assert_close(picked(one, DOCUMENTS[1:]), separate(whole, DOCUMENTS[1:]), 1e-5)


@pytest.mark.slow
def test_a_language_model_takes_them_too():
    model = language_model()
    rows = jax.random.randint(jax.random.key(0), (4, LENGTH), 0, 23)
    calls = {name: CALLS[name] for name in ("positions, ones", "mask of keys", "all")}

    @nnx.jit
    def run(model, rows):
        return model(alone(rows)), answers(model, rows, calls)

    wanted, got = run(model, rows)
    for y in got.values():
        assert_close(picked(y), separate(wanted), 2e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_gradients_are_those_of_the_row_without_padding():
    layer, x = LAYERS["ssd, grm"](nnx.Rngs(0)), jnp.asarray(inputs()[:1], jnp.float64)
    graph, state = nnx.split(layer)
    layer = nnx.merge(graph, jax.tree.map(lambda leaf: leaf.astype(x.dtype), state))

    @jax.jit
    def slopes(layer, x, positions):
        of_padded = jax.grad(lambda layer: (layer(x, positions=positions)[:, 5:] ** 2).sum())
        of_row = jax.grad(lambda layer: (layer(x[:, 5:]) ** 2).sum())
        return of_padded(layer), of_row(layer)

    padded, row = slopes(layer, x, POSITIONS["zeros and repeats"][:1])
    assert_close(padded, row, 1e-12)


@pytest.mark.slow
def test_swap_of_one_line():
    x = tokens(13)
    mask = nnx.make_causal_mask(x[..., 0])
    options: Any = dict(num_heads=2, in_features=16, decode=False, rngs=nnx.Rngs(0))
    calls = (
        lambda attn: attn(x, mask=mask),
        lambda attn: attn(inputs_q=x, mask=mask, deterministic=True, decode=False),
        lambda attn: attn(x, x, x, mask=mask, rngs=nnx.Rngs(1), sow_weights=False),
        lambda attn: attn(x, inputs_k=x, mask=mask, is_causal=False),
        lambda attn: attn(x, is_causal=True),
    )
    theirs = [call(nnx.MultiHeadAttention(**options)) for call in calls]
    assert all(y.shape == x.shape for y in theirs)
    wanted, *ours = jax.jit(lambda layer: [layer(x), *(call(layer) for call in calls)])(make("ssd"))
    for y in ours:
        assert_close(y, wanted, 1e-6)


@pytest.mark.slow
def test_one_array_given_twice_through_a_checkpoint():
    layer, x = make("ssd"), tokens(13)
    call, wanted = jax.checkpoint(lambda x, same: layer(x, same)), jax.jit(layer)(x)
    assert_close(call(x, x), wanted, 1e-6)
    assert_close(layer(x, x + 0), wanted, 1e-6)
    other = x.at[1, 5].add(1)
    y = jax.jit(layer)(x, other)
    assert_close(y[0], wanted[0], 1e-6)
    assert jnp.isnan(y[1]).all()


@pytest.mark.parametrize("build", [lambda: make("ssd"), lambda: LAYERS["attention"](nnx.Rngs(0))])
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(inputs_k=jnp.ones((2, 9, 16))), "inputs_k must be None or the input itself"),
        (dict(inputs_v=jnp.ones((2, 9, 16))), "inputs_v must be None or the input itself"),
        (dict(document_ids=jnp.ones((2, 9, 16))), "inputs_k must be None or the input itself"),
        (dict(decode=True), "decode=True is not for this layer: pass cache="),
        (dict(sow_weights=True), "sow_weights=True is not for this layer"),
        (dict(out_sharding="x"), "out_sharding is not for this layer"),
        (dict(qkv_sharding="x"), "qkv_sharding is not for this layer"),
        (dict(is_causal=False), "is_causal=False is not for this layer, which is causal"),
        (
            dict(document_ids=jnp.ones((2, 9), int), segment_ids=jnp.ones((2, 9), int)),
            "document_ids and segment_ids are the same: give one of them",
        ),
        (dict(segment_ids=jnp.ones((2, 8), int)), r"segment_ids must be integers .* \(2, 9\), got"),
        (dict(positions=jnp.ones((2, 9))), r"positions must be integers .* got float32 \(2, 9\)"),
        (dict(positions=jnp.arange(8)), r"positions must be integers .* got int32 \(8,\)"),
    ],
)
def test_what_is_refused_by_name(build, call, message):
    with pytest.raises(ValueError, match=message):
        build()(tokens(9), **call)


def test_an_unknown_keyword_or_no_input():
    layer: Any = make("ssd")
    with pytest.raises(TypeError, match="unexpected keyword argument 'bias'"):
        layer(tokens(9), bias=1)
    for call in (dict(), dict(x=tokens(9), inputs_q=tokens(9))):
        with pytest.raises(ValueError, match="give the input once"):
            layer(**call)
    with pytest.raises(TypeError, match="unexpected keyword argument 'decode'"):
        language_model()(jnp.zeros((1, 3), int), decode=False)  # pyright: ignore


@pytest.mark.parametrize("name", kept_of(["linear", "attention"], "attention"))
def test_rows_divided_by_explicit_axes(name):
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])
    calls = {call: CALLS[call] for call in FEW}
    build = dict(linear=lambda: make("linear"), attention=lambda: LAYERS[name](nnx.Rngs(0)))[name]
    wanted = jax.jit(answers)(build(), inputs(), calls)
    with jax.set_mesh(mesh):
        rows = jax.NamedSharding(mesh, jax.P("data"))
        layer, x, given = build(), *jax.device_put((inputs(), calls), rows)
        got = jax.jit(answers)(layer, x, given)
        if name == "attention":
            cache = layer.init_cache(4, LENGTH, sharding=jax.P("data"))
            piece = [rows[:, :16] for rows in (x, given[FEW[1]]["mask"])]
            y, _ = jax.jit(lambda x, mask, cache: layer(x, cache=cache, mask=mask))(*piece, cache)
            alone_row = np.asarray(wanted[FEW[1]])[0, 5:16]
            assert_close(np.asarray(y)[0, 5:16], alone_row, 1e-5)
    for call, y in got.items():
        assert y.sharding.spec[0] == "data"
        assert_close(picked(np.asarray(y)), picked(wanted[call]), 1e-5)


@pytest.mark.slow
def test_linen_takes_them_too():
    layer = mc.nn.linen.MemoryCaching(
        16, 2, memory=mc.memories.SSD(), aggregation=mc.GRM(), segmentation=mc.Constant(8)
    )
    x = tokens(13)
    variables = layer.init(jax.random.key(0), x)
    y = layer.apply(variables, x, mask=np.tri(13), deterministic=True)
    assert_close(y, layer.apply(variables, x), 1e-6)


EMPTY = [(0, 5), (2, 0)]


@pytest.mark.parametrize("shape", EMPTY)
@pytest.mark.parametrize("name", kept_of([*LAYERS], "titans, grm", fast=["attention"]))
def test_empty_inputs_give_empty_outputs_of_a_layer(name, shape):
    layer, x = LAYERS[name](nnx.Rngs(0)), jnp.zeros((*shape, 16), jnp.bfloat16)
    y = layer(x, positions=np.zeros(shape, int))
    assert y.shape == x.shape
    assert y.dtype == layer(tokens(3).astype(x.dtype)).dtype
    if shape[0]:
        cache: Any = layer.init_cache(2, 8)
        y, after = layer(x, cache=cache)
        assert y.shape == x.shape
        assert after is cache
    loss, slopes = jax.value_and_grad(lambda layer: layer(x).sum())(layer)
    assert loss == 0
    assert not any(np.any(slope) for slope in jax.tree.leaves(slopes))


@pytest.mark.parametrize(
    ("options", "shape"),
    product(
        dict(plain={}, tied=dict(tie_embeddings=True, remat=True)),
        dict(tokens=EMPTY[0], rows=EMPTY[1]),
        turn=0,
    ),
)
def test_empty_inputs_give_empty_outputs_of_a_model(options, shape):
    model, rows = language_model(**options), jnp.zeros(shape, int)
    logits = jax.eval_shape(lambda model: model(rows), model)
    assert (logits.shape, logits.dtype) == ((*shape, 23), jnp.float32)
    slopes = nnx.jit(nnx.grad(lambda model: model(rows).sum()))(model)
    assert not any(np.any(slope) for slope in jax.tree.leaves(slopes))
    if shape[0]:
        logits, _ = model(rows, cache=model.init_cache(2, 8))
        assert logits.shape == (*shape, 23)
