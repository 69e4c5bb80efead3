"""The layer's projections and coefficients, and where they start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from tests.cases import MEMORIES, normals, unit
from tests.covers import first_kept
from tests.nn.layer import call, make, tokens


@pytest.mark.slow
def test_keys_and_connectors_start_as_copies_of_queries():
    layer = make()
    for name in ("key", "connector"):
        np.testing.assert_array_equal(getattr(layer, name).kernel[...], layer.query.kernel[...])
    np.testing.assert_array_equal(layer.key_conv.kernel[...], layer.query_conv.kernel[...])
    assert not np.array_equal(layer.value.kernel[...], layer.query.kernel[...])
    np.testing.assert_array_equal(layer.temperature[...], 10.0)


def test_no_two_parameters_share_an_array():
    leaves = jax.tree.leaves(nnx.state(make()))  # or a model could not be donated
    assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)


@pytest.mark.slow
def test_attributes_of_other_tools_are_no_weights():
    layer, x = make(), tokens(9)
    expected = call(layer, x)
    for _, module in nnx.iter_modules(layer):
        module.qwix_path = ("some", "path")  # pyright: ignore
    for container in (layer.weights, layer.controls):
        container.qwix_path = ("some", "path")
    np.testing.assert_array_equal(call(layer, x), expected)


@pytest.mark.slow
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
        layer._control(layer.memory.controls[name], name, x, layer._split)
        for name in ("log_alpha", "log_beta", "eta")
    )
    assert log_alpha.shape == (2, 9, 2)
    assert 0.9 < float(jnp.exp(log_alpha).mean()) < 1
    assert 0.3 < float(jnp.exp(log_beta).mean()) < 0.7
    assert 0 < float(eta.mean()) < 1 / 4  # a chunk has 4 tokens


@pytest.mark.parametrize("memory", first_kept(1, ["dla", "titans", "titans_depth1"]))
def test_a_deep_memory_stores_before_any_training(memory):
    layer = make(memory, segmentation=mc.Constant(64))
    normal = normals(0, jnp.float32)
    key, value = (
        jnp.tile(x, (1, 16, 1, 1)) for x in (unit(normal(1, 4, 2, 8)), normal(1, 4, 2, 8))
    )
    x = tokens(64)[:1]
    controls = layer.memory.coupled(
        {
            name: layer._control(layer.memory.controls[name], name, x, layer._split)
            for name in layer.controls
        }
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
