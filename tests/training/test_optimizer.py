"""Schedules, optimizers by name, and what decays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.training.optimizer import make_optimizer, make_schedule
from memcache_jax.training.step import abstract_state
from tests.training.steps import OPTIONS, names, options, titans


def test_schedule_rises_and_falls():
    rate = np.asarray(jax.vmap(make_schedule(OPTIONS, 20))(jnp.arange(20)))
    np.testing.assert_allclose(rate[:4], [0.025, 0.05, 0.075, 0.1], rtol=1e-6)
    assert np.all(np.diff(rate[3:]) < 0)
    np.testing.assert_allclose(rate[-1], 0.01, rtol=1e-5)


def test_schedule_without_warmup_starts_at_the_peak():
    assert make_schedule(options(warmup_steps=0), 5)(0) == pytest.approx(0.1)


def test_warmup_must_end_before_the_last_step():
    with pytest.raises(
        ValueError, match=r"warmup_steps must be in \[0, steps\), got 5 for steps=5"
    ):
        make_optimizer(options(warmup_steps=5), 5)


def test_optimizers_go_by_their_names():
    lion = make_optimizer(options(name="lion", arguments=dict(mu_dtype="bfloat16")), 10)
    state: Any = lion.init({"kernel": jnp.ones(3)})
    assert state[1][0].mu["kernel"].dtype == jnp.bfloat16
    sgd = make_optimizer(options(name="sgd", warmup_steps=0), 10)
    params = {"kernel": jnp.ones(3)}
    updates: Any = sgd.update({"kernel": jnp.full(3, 0.1)}, sgd.init(params), params)[0]
    np.testing.assert_allclose(updates["kernel"], -0.01, rtol=1e-6)  # no decay


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adamq"}, "must be an optimizer of optax, such as adamw or lion, got 'adamq'"),
        ({"name": "EmptyState"}, "must be an optimizer of optax"),
        ({"arguments": {"momentum": 0.9}}, r"must be of optax.adamw: .*; got \['momentum'\]"),
    ],
)
def test_unknown_optimizers_and_arguments_are_told(changes, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(options(**changes), 10)


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_only_matrices_decay(name):
    optimizer = make_optimizer(options(name=name), 10)
    _, target = abstract_state(titans(), optimizer)
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), target.params)
    zero = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zero, jax.jit(optimizer.init)(params), params)
    decayed = {name for name, update in names(updates).items() if np.any(update)}
    block, projections = (
        "layers/blocks/0",
        ("query", "key", "value", "connector", "output_gate", "out"),
    )
    expected = {"embedding/embedding", "head/kernel"}
    expected |= {f"{block}/mixer/{name}/kernel" for name in projections}
    expected |= {f"{block}/mlp/{name}/kernel" for name in ("gate", "up", "down")}
    expected |= {f"{block}/mixer/controls/{name}/kernel" for name in mc.memories.Titans(4).controls}
    assert decayed == expected
