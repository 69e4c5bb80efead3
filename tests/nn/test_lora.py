"""Adapters of projections: which layers have them, and that every one is trained."""

import collections
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from memcache_jax.nn.language_model import abstract_model
from memcache_jax.nn.lora import Adapter
from memcache_jax.pretrained.given import read_given
from memcache_jax.pretrained.read import described
from tests.covers import first_kept, kept_of
from tests.pretrained.test_read import FOLDERS, NAMES, expected


def adapted(name):
    """A public model with caches, connectors and adapters."""
    model = mc.pretrained.load(FOLDERS / name)
    model = mc.nn.with_memory_caching(
        model, segmentation=mc.Constant(16), aggregation=mc.GRM(gate="content")
    )
    return mc.nn.with_lora(model, rank=2, rngs=nnx.Rngs(0))


def adapters(model, part="low_rank"):
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {path: param[...] for path, param in flat if part in path}


@pytest.mark.parametrize("name", kept_of(NAMES, *NAMES[::3], fast=["kimi_linear"]))
def test_every_adapter_is_called_once(name, monkeypatch):
    given = described(read_given(FOLDERS / name), dtype=jnp.float32, param_dtype=jnp.float32)
    config = dataclasses.replace(given, lora=mc.nn.LoRA(2), scan_layers=False)
    model = nnx.merge(*abstract_model(config))
    adapters: list[Any] = [p for _, p in nnx.iter_modules(model) if isinstance(p, Adapter)]
    for number, adapter in enumerate(adapters):
        adapter.number = number
    graph, state = nnx.split(model)
    called, call = collections.Counter(), Adapter.__call__

    def counted(self, inputs, *args):
        called[self.number] += 1
        return call(self, inputs, *args)

    monkeypatch.setattr(Adapter, "__call__", counted)
    tokens = jnp.zeros((1, 5), jnp.int32)

    jax.eval_shape(lambda state: nnx.merge(graph, state)(tokens), state)
    assert called == collections.Counter(range(len(adapters)))
    assert len(adapters) >= 6


@pytest.mark.parametrize("name", first_kept(1, ["kimi_linear", "fla_rwkv7"]))
def test_the_adapters_of_every_layer_are_trained(name):
    model = adapted(name)
    tokens, _ = expected(name)
    # B is zero at first, and with it the gradient of A.
    for _, part in nnx.iter_modules(model):
        if isinstance(part, Adapter):
            part.up.kernel[...] += 0.01

    @jax.jit
    def gradients(model):
        of_adapters = nnx.DiffState(0, nnx.All(nnx.Param, nnx.PathContains("low_rank")))
        return nnx.grad(lambda model: jnp.mean(model(tokens) ** 2), argnums=of_adapters)(model)

    found = {path: leaf[...] for path, leaf in nnx.to_flat_state(gradients(model))}
    kernels = {path[:-1] for path in adapters(model, "linear") if path[-1] == "kernel"}
    assert len(found) >= 2 * len({path for path in kernels if "low_rank" not in path})
    for path, gradient in found.items():
        of_layers = np.abs(gradient).max(axis=(-2, -1))
        assert of_layers.shape == gradient.shape[:1], path
        assert (of_layers > 0).all(), path


@pytest.mark.slow
def test_what_has_adapters_and_what_has_none():
    model = adapted("qwen3_5_text")
    with_one = {
        path[-1]
        for path, part in nnx.iter_modules(model)
        if getattr(part, "low_rank", None) is not None
    }
    assert with_one == {"linear", "gate", "up", "down", "out", "query", "key", "value"}
    assert model.head.low_rank is None
    assert model.layers[0].blocks[0].mixer.connector.low_rank is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rank=0), "rank must be"),
        (dict(alpha=0.0), "alpha must be above 0, got 0.0"),
        (dict(alpha=float("nan")), "alpha must be"),
    ],
    ids=str,
)
def test_sizes_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        mc.nn.LoRA(**options)


def test_adapters_of_a_configuration_are_divided_as_the_projection_is():
    config = mc.nn.LanguageModelConfig(
        11, 2, features=8, num_heads=2, mixers=(mc.nn.AttentionMixer(),), lora=mc.nn.LoRA(2)
    )
    state = jax.eval_shape(
        lambda: nnx.state(mc.nn.LanguageModel(config, rngs=nnx.Rngs(0)), nnx.Param)
    )
    names = {
        "/".join(map(str, path[-3:-1])): param.get_metadata()["out_sharding"]
        for path, param in nnx.to_flat_state(state)
        if "mlp" in path and "gate" in path and "low_rank" in path
    }
    assert names == {
        "low_rank/down": ("layers", "embed", None),
        "low_rank/up": ("layers", None, "mlp"),
    }
