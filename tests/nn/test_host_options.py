"""Options that hosts pass to attention: taken, or refused by name."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax.nn import initializers

import memcache_jax as mc
from tests.cases import assert_close
from tests.nn.layer import call, make, randomized, tokens

BIASED = ("query", "key", "value", "out")


def attention(**options: Any):
    return mc.nn.Attention(16, 2, rngs=nnx.Rngs(0), **options)


def memory(**options: Any):
    return make("ssd", **options)


BUILDS = pytest.mark.parametrize("build", [memory, attention], ids=["memory", "attention"])


def leaves(layer):
    flat, _ = jax.tree_util.tree_flatten_with_path(nnx.as_pure(nnx.state(layer)))
    return {jax.tree_util.keystr(path): leaf for path, leaf in flat}


@BUILDS
def test_what_flax_has_by_default_changes_nothing(build):
    # As a configuration of a host may spell them out.
    spelled = build(
        kernel_init=initializers.lecun_normal(),
        out_kernel_init=None,
        use_bias=False,
        bias_init=initializers.zeros,
        out_bias_init=None,
        precision=None,
        qkv_features=16,
        out_features=16,
        in_kv_features=None,
        num_kv_heads=2,
        num_key_value_heads=None,
        dropout_rate=0.0,
        broadcast_dropout=True,
        deterministic=None,
        keep_rngs=True,
        decode=False,
        normalize_qk=False,
        attention_fn=nnx.dot_product_attention,
        qkv_promote_dtype=promote_dtype,
        out_promote_dtype=promote_dtype,
        ln_promote_dtype=promote_dtype,
        qkv_dot_general=None,
        out_dot_general_cls=None,
        kernel_metadata={},
        out_bias_metadata={},
    )
    jax.tree.map(np.testing.assert_array_equal, leaves(spelled), leaves(build()))


@BUILDS
def test_kernels(build):
    layer = build(kernel_init=initializers.constant(2.0), out_kernel_init=initializers.ones)
    for name in ("query", "key", "value"):
        np.testing.assert_array_equal(getattr(layer, name).kernel[...], 2.0)
    np.testing.assert_array_equal(layer.out.kernel[...], 1.0)
    same = build(kernel_init=initializers.constant(2.0))
    np.testing.assert_array_equal(same.out.kernel[...], 2.0)


def test_the_other_kernels_of_a_memory():
    drawn = make("ssd", kernel_init=initializers.normal(3.0), use_bias=True)
    np.testing.assert_array_equal(drawn.key.kernel[...], drawn.query.kernel[...])
    np.testing.assert_array_equal(drawn.connector.kernel[...], drawn.query.kernel[...])
    assert not np.array_equal(drawn.value.kernel[...], drawn.query.kernel[...])
    assert 2 < jnp.std(drawn.output_gate.kernel[...]) < 4
    # Coefficients start near their bias whatever the host says.
    assert jnp.abs(drawn.controls.lam.kernel[...]).max() < 0.5


@pytest.mark.slow
@BUILDS
def test_biases(build):
    layer, plain = build(use_bias=True), build()
    added = {f"['{name}']['bias']" for name in BIASED}
    assert leaves(layer).keys() - leaves(plain).keys() == added
    assert leaves(plain).keys() <= leaves(layer).keys()
    assert not any(np.any(getattr(layer, name).bias[...]) for name in BIASED)
    drawn = build(use_bias=True, bias_init=initializers.normal(), out_bias_init=initializers.ones)
    np.testing.assert_array_equal(drawn.out.bias[...], 1.0)
    assert np.any(drawn.value.bias[...] != drawn.query.bias[...])
    copied = isinstance(drawn, mc.nn.MemoryCaching)
    assert copied == np.array_equal(drawn.key.bias[...], drawn.query.bias[...])
    # The last one is added to the output.
    layer.out.bias[...] += 1.0
    x = tokens(9)
    moved = call(layer, x)
    layer.out.bias[...] -= 1.0
    assert_close(moved - 1.0, call(layer, x), 1e-5)


@pytest.mark.slow
@BUILDS
def test_biases_hold_in_documents_and_streams(build):
    layer, x = randomized(build(use_bias=True)), tokens(16)

    @jax.jit
    def run(layer, x):
        ids = jnp.tile(jnp.arange(16)[None] // 8, (2, 1))
        cache = layer.init_cache(2, 16)
        begin, cache = layer(x[:, :11], cache=cache)
        end, _ = layer(x[:, 11:], cache=cache)
        streamed = jnp.concatenate([begin, end], axis=1)
        return layer(x), streamed, layer(x, ids)[:, 8:], layer(x[:, 8:])

    whole, streamed, packed, alone = run(layer, x)
    assert_close(streamed, whole, 1e-5)
    assert_close(packed, alone, 1e-5)


@BUILDS
def test_precision_reaches_every_projection(build):
    layer = build(precision="highest")
    lines = str(jax.make_jaxpr(lambda x: layer.out(layer.query(x)))(tokens(3))).splitlines()
    products = [line for line in lines if "dot_general" in line]
    assert len(products) == 2
    assert layer.query.precision == layer.out.precision == layer.value.precision == "highest"
    assert build().query.precision is None


@BUILDS
def test_axes_of_kernels_are_the_layers_own(build):
    init = nnx.with_partitioning(initializers.ones, ("features", "heads", "depth"))
    own = {p: v.get_metadata() for p, v in nnx.to_flat_state(nnx.state(build()))}
    named = nnx.to_flat_state(nnx.state(build(kernel_init=init)))
    assert {path: v.get_metadata() for path, v in named} == own


@BUILDS
def test_qkv_features_give_the_heads_dimension(build):
    layer = build(qkv_features=24)
    assert layer.head_dim == 12
    assert layer.out.kernel.shape == (24, 16)
    assert build(qkv_features=24, head_dim=12).head_dim == 12


@BUILDS
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dropout_rate=0.1), "takes no dropout_rate=0.1: it has no dropout"),
        (dict(num_kv_heads=1), "takes no num_kv_heads=1: keys and values have num_heads=2"),
        (dict(num_key_value_heads=1), "takes no num_key_value_heads=1: keys and values"),
        (dict(out_features=8), "takes no out_features=8: inputs and outputs have in_features=16"),
        (dict(in_kv_features=8), "takes no in_kv_features=8: inputs and outputs"),
        (dict(decode=True), "takes no decode=True: streams go through init_cache"),
        (dict(normalize_qk=True), "takes no normalize_qk=True: it has no LayerNorm"),
        (dict(attention_fn=print), "takes no attention_fn=<built-in function print>: it takes"),
        (dict(qkv_promote_dtype=print), "takes no qkv_promote_dtype=.*: dtype and param_dtype"),
        (dict(ln_promote_dtype=print), "takes no ln_promote_dtype=.*: dtype and param_dtype"),
        (dict(qkv_dot_general=print), "takes no qkv_dot_general=.*: its products are"),
        (dict(out_dot_general_cls=print), "takes no out_dot_general_cls=.*: its products are"),
        (dict(kernel_metadata={"a": 1}), "takes no kernel_metadata={'a': 1}: its parameters carry"),
        (dict(qkv_features=15), "with num_heads=2 a multiple of it, got 15"),
        (dict(qkv_features=24, head_dim=4), "num_heads \\* head_dim, with num_heads=2 8, got 24"),
        (dict(qkv_features=0), "qkv_features must be at least 1, got 0"),
    ],
)
def test_what_is_refused_by_name(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@BUILDS
def test_an_unknown_option_is_a_type_error(build):
    name = type(build()).__name__
    message = rf"{name}.__init__\(\) got an unexpected keyword argument 'kernel_inits'"
    with pytest.raises(TypeError, match=message):
        build(kernel_inits=None)
