"""Models that a configuration describes, and those that it must not."""

import dataclasses
import inspect

import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

import memcache_jax as mc
from memcache_jax.nn import AttentionMixer, MemoryCachingMixer
from memcache_jax.training.config import default_config
from memcache_jax.training.models import model_config, model_options


def test_default_describes_titans_with_grm():
    model = model_config(default_config().model)
    memory = mc.memories.Titans(chunk_size=32, expansion=2, depth=2)
    assert model.mixers == (MemoryCachingMixer(memory, mc.GRM(), mc.Constant(128)),)
    assert model.vocab_size == 257
    assert model.dtype == jnp.float32


def test_mixers_are_a_pattern():
    config = default_config()
    config.model.mixers = ("memory_caching", "sliding_window", "attention")
    config.model.num_layers, config.model.window = 6, 64
    first, second, third = model_config(config.model).mixers
    assert isinstance(first, MemoryCachingMixer)
    assert second == AttentionMixer(window=64)
    assert third == AttentionMixer(window=None)


def test_routers_and_states_of_another_layer_are_described():
    config = default_config()
    config.model.aggregation = ConfigDict({"name": "SSC", "router": {"name": "Tree", "beam": 2}})
    config.model.mixers, config.model.num_layers = ("memory_caching", "previous_states"), 4
    model = model_config(config.model)
    own, other = model.mixers
    assert isinstance(own, MemoryCachingMixer)
    assert isinstance(other, MemoryCachingMixer)
    assert own == dataclasses.replace(own, aggregation=mc.SSC(router=mc.Tree(beam=2)))
    assert other == dataclasses.replace(own, states="previous")
    assert model_config(model_options(model)) == model
    config.model.mixers = ("memory_as_context", "sliding_window")
    model = model_config(config.model)
    assert model.mixers[0] == mc.nn.MemoryAsContextMixer(own, config.model.window)
    assert model_config(model_options(model)) == model


def test_bfloat16():
    config = default_config()
    config.model.dtype = "bfloat16"
    assert model_config(config.model).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", mc.memories.__all__)
def test_every_memory_is_found_by_its_name(name):
    cls = getattr(mc.memories, name)
    if not issubclass(cls, mc.memories.Memory) or inspect.isabstract(cls):
        pytest.skip("not a rule")
    config = default_config()
    config.model.memory = ConfigDict({"name": name})
    (mixer,) = model_config(config.model).mixers
    assert isinstance(mixer, MemoryCachingMixer)
    assert isinstance(mixer.memory, cls)


def test_a_new_rule_is_found(monkeypatch):
    class Sum(mc.memories.LinearAttention):
        pass

    monkeypatch.setattr(mc.memories, "Sum", Sum, raising=False)
    config = default_config()
    config.model.memory = ConfigDict({"name": "Sum"})
    (mixer,) = model_config(config.model).mixers
    assert isinstance(mixer, MemoryCachingMixer)
    assert isinstance(mixer.memory, Sum)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "memory",
            {"name": "Titan"},
            "model.memory.name must be one of .*LinearAttention.*'Titan'",
        ),
        ("memory", {"name": "Memory"}, "model.memory.name must be one of"),
        ("memory", {"chunk_size": 8}, "model.memory.name must be one of .*got None"),
        (
            "memory",
            {"name": "Titans", "top_k": 4},
            "arguments chunk_size, degree, depth, .*got top_k",
        ),
        ("memory", {"name": "Titans", "depth": 3}, "depth 1 or 2, got depth=3"),
        ("memory", {"name": "Titans", "chunk_size": "8"}, "model.memory: cannot make Titans"),
        ("aggregation", {"name": "Sum"}, "model.aggregation.name must be one of GRM.*Residual"),
        ("segmentation", {"name": "Equal"}, "model.segmentation.name must be one of Adaptive"),
        ("segmentation", {"name": "Constant", "size": 0}, "size must be at least 1, got 0"),
        ("mixers", ("attention", "rnn"), "model.mixers must be of .*got rnn"),
        ("mixers", (), "model.mixers must be of .*got none"),
        ("dtype", "float16", r"model.dtype must be one of \[.float32., .bfloat16.\], got"),
        ("num_layers", 0, "num_layers must be at least 1"),
    ],
)
def test_bad_models_are_refused(key, value, message):
    config = default_config()
    config.model[key] = ConfigDict(value) if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=message):
        model_config(config.model)
