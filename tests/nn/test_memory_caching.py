"""The layer: causal, any length, its starting point, its precision, its errors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from memcache_jax.nn.layers import CausalConv, l2_normalize
from tests.cases import AGGREGATIONS, MEMORIES, assert_close, normals, unit


def make(memory="titans", aggregation="grm", **changes):
    options: Any = dict(segmentation=mc.Constant(8), rngs=nnx.Rngs(0)) | changes
    return mc.nn.MemoryCaching(
        16, 2, memory=MEMORIES[memory], aggregation=AGGREGATIONS[aggregation], **options
    )


def randomized(layer, seed=1):
    """The layer with other parameters than it starts with, so that no two are alike."""
    graph, params = nnx.split(layer)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


def tokens(length, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), (2, length, 16), dtype)


def call(layer, x):
    return jax.jit(lambda layer, x: layer(x))(layer, x)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("memory", "aggregation", "start"),
    [
        ("linear", "grm", "independent"),
        ("gated_deltanet", "ssc", "checkpoint"),
        ("rwkv7", "residual", "independent"),
        ("titans", "soup", "checkpoint"),
    ],
)
def test_layer_is_causal_and_prefix_consistent(memory, aggregation, start):
    layer = randomized(make(memory, aggregation, start=start))
    x = tokens(21, dtype=jnp.float64)
    y = call(layer, x)
    changed = call(layer, x.at[:, 13:].add(1.0))
    assert_close(changed[:, :13], y[:, :13], 1e-13)
    assert jnp.abs(changed[:, 13:] - y[:, 13:]).max(axis=(0, 2)).min() > 1e-6
    assert_close(call(layer, x[:, :13]), y[:, :13], 1e-13)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("memory", MEMORIES)
def test_every_parameter_has_a_gradient(memory):
    layer, x = randomized(make(memory)), tokens(21, dtype=jnp.float64)
    graph, params = nnx.split(layer)
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(nnx.merge(graph, params)(x) ** 2)))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        name = jax.tree_util.keystr(path)
        if memory == "vector" and "query" in name:
            continue  # which such a memory is blind to
        assert float(jnp.abs(leaf).max()) > 1e-9, name


def test_keys_and_connectors_start_as_copies_of_queries():
    layer = make()
    for name in ("key", "connector"):
        np.testing.assert_array_equal(getattr(layer, name).kernel[...], layer.query.kernel[...])
    np.testing.assert_array_equal(layer.key_conv.kernel[...], layer.query_conv.kernel[...])
    assert not np.array_equal(layer.value.kernel[...], layer.query.kernel[...])
    np.testing.assert_array_equal(layer.temperature[...], 10.0)


def test_connector_may_be_the_query_or_logits_of_positions():
    layer = make(connector="query")
    assert not hasattr(layer, "connector")
    assert call(layer, tokens(21)).shape == (2, 21, 16)
    layer = mc.nn.MemoryCaching(
        16,
        2,
        memory=MEMORIES["linear"],
        aggregation=mc.GRM(gate="position"),
        segmentation=mc.Constant(8),
        distances=5,
        rngs=nnx.Rngs(0),
    )
    assert layer.connector.kernel.shape == (16, 2 * 5)
    assert call(layer, tokens(21)).shape == (2, 21, 16)


def test_residual_has_no_connector():
    layer = make(aggregation="residual")
    assert not hasattr(layer, "connector")
    assert not hasattr(layer, "temperature")


def test_titans_controls_start_near_keeping_and_small():
    layer, x = make(), tokens(9)
    log_alpha, log_beta, eta = (
        layer._control(layer.memory.controls[name], name, x)
        for name in ("log_alpha", "log_beta", "eta")
    )
    assert log_alpha.shape == (2, 9, 2)
    assert 0.9 < float(jnp.exp(log_alpha).mean()) < 1
    assert 0.3 < float(jnp.exp(log_beta).mean()) < 0.7
    assert 0 < float(eta.mean()) < 1 / 4  # a chunk has 4 tokens


@pytest.mark.parametrize("memory", ["dla", "titans", "titans_depth1"])
def test_a_deep_memory_stores_before_any_training(memory):
    layer = make(memory, segmentation=mc.Constant(64))
    normal = normals(0, jnp.float32)
    key, value = (
        jnp.tile(x, (1, 16, 1, 1)) for x in (unit(normal(1, 4, 2, 8)), normal(1, 4, 2, 8))
    )
    x = tokens(64)[:1]
    controls = layer.memory.coupled(
        {name: layer._control(layer.memory.controls[name], name, x) for name in layer.controls}
    )
    y = mc.memory_caching(
        *(key, key, value),
        memory=layer.memory,
        controls=controls,
        weights={name: weight[...] for name, weight in layer.weights.items()},
        aggregation=mc.Residual(),
        segmentation=mc.Constant(64),
    )
    recalled = jnp.vecdot(y, value) / jnp.vecdot(value, value)
    assert (recalled[:, -4:].mean(axis=1) > recalled[:, :4].mean(axis=1) + 0.1).all()


def test_soup_is_not_grm_before_any_training():
    x = tokens(21)
    soup, grm = (call(make(aggregation=aggregation), x) for aggregation in ("soup", "grm"))
    assert_close(soup[:, :8], grm[:, :8], 1e-5)
    assert jnp.abs(soup[:, 8:] - grm[:, 8:]).max() > 1e-3


def test_bfloat16_inputs_keep_float32_parameters_and_return_bfloat16():
    layer = make(dtype=jnp.bfloat16)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(nnx.state(layer)))
    x = tokens(21)
    y = call(layer, x)
    assert y.dtype == jnp.bfloat16
    # The projections round at every product; no state or gate does.
    assert_close(y.astype(jnp.float32), call(make(), x), 3e-2)


def test_reference_implementation_gives_the_same_layer():
    x = tokens(13)
    assert_close(call(make(implementation="reference"), x), call(make(), x), 1e-5)


def test_head_dim_need_not_divide_the_features():
    layer = make(head_dim=12)
    assert call(layer, tokens(9)).shape == (2, 9, 16)
    assert layer.out.kernel.shape == (24, 16)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("length", [1, 3, 11])
def test_convolution_equals_its_sum(length):
    conv = CausalConv(
        4, 4, kernel_init=nnx.initializers.normal(1.0), param_dtype=jnp.float64, rngs=nnx.Rngs(0)
    )
    x = jax.random.normal(jax.random.key(1), (2, length, 4))

    def wanted(kernel, x):
        rows = []
        for t in range(length):
            taps = [kernel[j] * x[:, t - 3 + j] for j in range(4) if t - 3 + j >= 0]
            rows.append(jax.nn.silu(sum(taps)))
        return jnp.stack(rows, axis=1)

    def got(kernel, x):
        graph, _, rest = nnx.split(conv, nnx.Param, ...)
        return nnx.merge(graph, {"kernel": nnx.Param(kernel)}, rest)(x)

    with jax.numpy_rank_promotion("allow"):
        y, pull = jax.vjp(got, conv.kernel[...], x)
        y_wanted, pull_wanted = jax.vjp(wanted, conv.kernel[...], x)
        cotangent = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
        assert_close(y, y_wanted, 1e-14)
        assert_close(pull(cotangent), pull_wanted(cotangent), 1e-13)


def test_normalized_rows_have_norm_one_also_from_bfloat16():
    x = 100 * jax.random.normal(jax.random.key(0), (3, 5, 8))
    np.testing.assert_allclose(jnp.linalg.norm(l2_normalize(x), axis=-1), 1.0, rtol=1e-5)
    y = l2_normalize(x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(jnp.linalg.norm(y.astype(float), axis=-1), 1.0, rtol=1e-2)
    np.testing.assert_array_equal(l2_normalize(jnp.zeros((2, 4))), 0.0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_heads=3), "num_heads=3 must divide in_features=16"),
        (dict(segmentation=mc.Constant(6)), "chunk size of Titans, 4, must divide"),
        (dict(num_heads=0), "num_heads must be at least 1, got 0"),
        (dict(head_dim=0), "head_dim must be at least 1, got 0"),
        (dict(implementation="cuda"), r"implementation must be one of .* got 'cuda'"),
        (dict(aggregation=mc.GRM), "aggregation must be an object such as"),
        (dict(start="continue"), r"start must be one of .* got 'continue'"),
    ],
)
def test_arguments_that_do_not_fit(options, message):
    options = (
        dict(num_heads=2, segmentation=mc.Constant(8), aggregation=mc.GRM(), rngs=nnx.Rngs(0))
        | options
    )
    with pytest.raises(ValueError, match=message):
        mc.nn.MemoryCaching(16, memory=MEMORIES["titans"], **options)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("shape", [(5, 16), (2, 5, 15)])
@pytest.mark.parametrize("build", [make, lambda: mc.nn.Attention(16, 2, rngs=nnx.Rngs(0))])
def test_input_of_another_shape(build, shape):
    with pytest.raises(ValueError, match=r"must be \(b, t, d\) with d = in_features = 16"):
        build()(jnp.zeros(shape))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("aggregation", "segmentation"),
    [
        ("residual", mc.Constant(8)),
        ("grm", mc.Constant(64)),
        ("grm", mc.Logarithmic(4)),
        ("ssc", mc.Constant(8)),
    ],
    ids=str,
)
def test_gates_are_those_of_the_reads(aggregation, segmentation):
    layer = randomized(make("linear", aggregation, segmentation=segmentation))
    length = 45

    @jax.jit
    def run(layer, x):
        rows = layer.operands(x)
        options: Any = dict(aggregation=layer.aggregation, segmentation=segmentation)
        y = mc.memory_caching(**rows, memory=layer.memory, **options)
        return layer.gates(x), rows, y

    gates, rows, wanted = run(layer, tokens(length, dtype=jnp.float64))

    # A linear memory returns the sum of the values that it holds, each by its key's match.
    plan, at = segmentation.plan(length), np.arange(length)
    begin, end = plan.block_size * plan.buckets.T[..., None]
    held = ((begin <= at) & (at < end)).astype(float)
    live_begin = plan.first[at // plan.block_size] * plan.block_size
    live = np.tri(length) * (at >= live_begin[:, None])
    weight = jnp.einsum("bths,sj->bhtj", gates[..., :-1], held)
    weight += jnp.einsum("bth,tj->bhtj", gates[..., -1], live)
    match = jnp.einsum("bthk,bjhk->bhtj", rows["query"], rows["key"])
    assert_close(jnp.einsum("bhtj,bhtj,bjhv->bthv", match, weight, rows["value"]), wanted, 1e-12)
