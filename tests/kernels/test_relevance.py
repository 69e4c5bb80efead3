"""The relevance of segments against its equation, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memcache_jax.kernels._dispatch import interpret_kernels
from memcache_jax.kernels.relevance import relevance, tpu
from tests.cases import normals, value_and_vjp
from tests.covers import first_kept
from tests.kernels.interpreters import all_parallel, compare_to_reference, finds_races


def make_case(heads, blocks, rows, features, dtype="float32"):
    normal = normals(0, np.float32)
    return [jnp.asarray(normal(2, heads, blocks, rows, features), dtype) for _ in range(2)]


@pytest.mark.parametrize(
    ("case", "pooling", "dtype"),
    first_kept(
        2,
        {
            "mean": ((3, 4, 5, 8), "mean", "float32"),
            "bfloat16, two pieces": ((2, 2, 130, 8), "sum", "bfloat16"),
            "one head": ((1, 3, 128, 20), "mean", "bfloat16"),
        },
    ),
)
def test_equals_reference(case, pooling, dtype):
    arrays = make_case(*case, dtype=dtype)
    compare_to_reference(
        functools.partial(relevance, pooling=pooling),
        "pallas_tpu",
        *arrays,
        tolerance=1e-2 if dtype == "bfloat16" else 1e-6,
        wanted_dtype=jnp.float32,
    )


def test_a_key_that_is_not_finite():
    connector, key = make_case(1, 4, 5, 8)
    key = key.at[0, 0, 1, 2, 3].set(jnp.nan)

    def both(implementation):
        run = functools.partial(relevance, pooling="mean", implementation=implementation)
        with interpret_kernels():
            return value_and_vjp(run, connector, key)

    got, wanted = both("pallas_tpu"), both("reference")
    spoilt = np.zeros(got[0][0].shape, bool)
    spoilt[0, :, 2:, :, 1] = True
    np.testing.assert_array_equal(np.isnan(got[0][0]), spoilt)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), got, wanted)


@pytest.mark.slow
def test_races(monkeypatch):
    arrays = [x[:1] for x in make_case(1, 3, 4, 8)]
    run = functools.partial(relevance, pooling="mean", implementation="pallas_tpu")
    assert not finds_races(functools.partial(value_and_vjp, run), *arrays)
    monkeypatch.setattr(tpu, "tpu_call", all_parallel(tpu.tpu_call))
    assert finds_races(run, *arrays)
