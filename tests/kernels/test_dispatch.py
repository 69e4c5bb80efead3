"""Choice among implementations: by name, and by platform where one was measured to be faster."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memcache_jax.kernels import _dispatch
from memcache_jax.kernels._dispatch import check_served, choose


def double(x, index, scale):
    return 2 * scale * x[index]


def triple(x, index, scale):
    return 3 * scale * x[index]


def refuse(x, index, scale):
    check_served("op", "pallas_tpu", [(True, "one"), (False, "two"), (True, "three")])


IMPLEMENTATIONS = {"xla": double, "pallas_tpu": triple, "pallas_gpu": refuse}
ARGUMENTS = (jnp.arange(4.0), jnp.array([2, 1]), np.float32(10))


def test_by_name():
    assert choose("op", IMPLEMENTATIONS, None) is double
    assert choose("op", IMPLEMENTATIONS, "pallas_tpu") is triple
    with pytest.raises(ValueError, match="got 'cuda'"):
        choose("op", IMPLEMENTATIONS, "cuda")


def test_every_reason_is_told():
    with pytest.raises(NotImplementedError, match="cannot serve: one; three"):
        choose("op", IMPLEMENTATIONS, "pallas_gpu")(*ARGUMENTS)


@pytest.mark.parametrize(
    ("platform", "best", "factor"),
    [("cpu", "pallas_tpu", 30), ("tpu", "pallas_tpu", 20), ("cpu", "pallas_gpu", 20)],
    ids=["this platform", "another platform", "cannot serve"],
)
def test_the_platform_chooses(monkeypatch, platform, best, factor):
    monkeypatch.setattr(_dispatch, "AUTOMATIC", {"op": {platform: best}})
    function = choose("op", IMPLEMENTATIONS, None)
    x, index, scale = ARGUMENTS
    y, pull = jax.vjp(jax.jit(lambda x: function(x, index, scale)), x)
    np.testing.assert_array_equal(y, factor * x[index])
    np.testing.assert_array_equal(pull(y)[0], jnp.zeros(4).at[index].set(factor * y))


def test_the_platform_is_the_one_compiled_for(monkeypatch):
    monkeypatch.setattr(_dispatch, "AUTOMATIC", {"op": {"tpu": "pallas_tpu"}})
    x, index, scale = ARGUMENTS
    function = jax.jit(lambda x: choose("op", IMPLEMENTATIONS, None)(x, index, scale))
    texts = {
        platform: function.trace(x).lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "tpu")
    }
    factors = {
        platform: [factor for factor in (20, 30) if f"{factor / 10}00000e+01" in text]
        for platform, text in texts.items()
    }
    assert factors == {"cpu": [20], "tpu": [30]}
