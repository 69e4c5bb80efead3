"""Eager calls are compiled once for each configuration and shape."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from tests.cases import MEMORIES, assert_close, make_inputs

MEMORY = MEMORIES["linear"]
HOW: Any = dict(aggregation=mc.GRM(), segmentation=mc.Constant(4))


def compiles(function, caplog):
    """What a call returns, and how many programs it compiled."""
    caplog.clear()
    with jax.log_compiles():
        result = jax.block_until_ready(function())
    return result, sum(record.message.startswith("Compiling") for record in caplog.records)


def layer():
    made = mc.nn.MemoryCaching(8, 2, memory=MEMORY, **HOW, rngs=nnx.Rngs(0))
    x, cache = jnp.ones((1, 9, 8)), made.init_cache(1, 9)
    return lambda i: made(x + i), lambda i: made.extend(x[:, :2] + i, cache)[0]


def model():
    mixer = mc.nn.MemoryCachingMixer(MEMORY, **HOW)
    config = mc.nn.LanguageModelConfig(11, 2, 8, 2, (mixer,), mlp_features=8)
    made = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
    tokens, cache = jnp.arange(9)[None], made.init_cache(1, 9)
    return lambda i: made(tokens + i), lambda i: made.extend(tokens[:, :2] + i, cache)[0]


@pytest.mark.parametrize("make", [layer, model])
def test_a_second_call_compiles_nothing(make, caplog):
    for call in make():
        first, programs = compiles(lambda call=call: call(0), caplog)
        assert programs > 0
        call(1)
        second, programs = compiles(lambda call=call: call(1), caplog)
        assert programs == 0
        assert np.abs(first - second).max() > 1e-4


def test_other_parts_are_other_programs():
    inputs = jax.tree.map(jnp.asarray, make_inputs(MEMORY, 9))
    results = [
        mc.memory_caching(**inputs, memory=MEMORY, **HOW | dict(aggregation=aggregation))
        for aggregation in (mc.GRM(), mc.Residual(), mc.GRM())
    ]
    assert_close(results[2], results[0], 0)
    assert np.abs(results[1] - results[0]).max() > 1e-3


@dataclasses.dataclass(frozen=True)
class Unhashable(mc.GRM):
    """A user's part that has no hash."""

    numbers: list = dataclasses.field(default_factory=list)


class Scaled(mc.GRM):
    """A user's part that is known by its identity, and may change."""

    scale: Any

    def __init__(self, scale):
        super().__init__()
        object.__setattr__(self, "scale", scale)

    __hash__ = object.__hash__

    def read(self, bank, live, query, selection):
        return self.scale * super().read(bank, live, query, selection)


def test_a_part_that_changes_is_read_anew():
    inputs = jax.tree.map(jnp.asarray, make_inputs(MEMORY, 9))
    part = Scaled(1.0)

    def run(scale):
        object.__setattr__(part, "scale", scale)
        return mc.memory_caching(**inputs, memory=MEMORY, **HOW | dict(aggregation=part))

    first = run(1.0)
    assert_close(run(2.0), 2 * first, 1e-6)
    assert_close(jax.grad(lambda scale: run(scale).sum())(2.0), first.sum(), 1e-5)


def test_a_model_sees_what_changes_in_its_modules():
    made = []
    mixer = mc.nn.MemoryCachingMixer(MEMORY, **HOW | dict(aggregation=Scaled(1.0)))
    config = mc.nn.LanguageModelConfig(11, 1, 8, 2, (mixer,), mlp_features=8)
    whole = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
    for scale in (1.0, 3.0):
        object.__setattr__(mixer.aggregation, "scale", scale)
        made.append(whole(jnp.arange(9)[None]))
    assert np.abs(made[1] - made[0]).max() > 1e-5


def test_what_has_no_hash_is_called_as_it_is():
    inputs = jax.tree.map(jnp.asarray, make_inputs(MEMORY, 9))
    got = mc.memory_caching(**inputs, memory=MEMORY, **HOW | dict(aggregation=Unhashable()))
    assert_close(got, mc.memory_caching(**inputs, memory=MEMORY, **HOW), 1e-6)
