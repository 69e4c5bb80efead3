"""Parts of layers: the causal convolution, normalized rows and rows of tables."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memcache_jax.nn.layers import NAN_OUTSIDE, CausalConv, l2_normalize, rows_of
from tests.cases import assert_close, value_and_vjp
from tests.covers import first_kept


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("length", first_kept(1, [11, 1, 3]))
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
        (y, slopes), (y_wanted, slopes_wanted) = (
            value_and_vjp(function, conv.kernel[...], x) for function in (got, wanted)
        )
    assert_close(y, y_wanted, 1e-14)
    assert_close(slopes, slopes_wanted, 1e-13)


def test_normalized_rows_have_norm_one_also_from_bfloat16():
    x = 100 * jax.random.normal(jax.random.key(0), (3, 5, 8))
    np.testing.assert_allclose(jnp.linalg.norm(l2_normalize(x), axis=-1), 1.0, rtol=1e-5)
    y = l2_normalize(x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(jnp.linalg.norm(y.astype(float), axis=-1), 1.0, rtol=1e-2)
    np.testing.assert_array_equal(l2_normalize(jnp.zeros((2, 4))), 0.0)


def test_rows_of_a_table_and_their_gradient():
    table = jax.random.normal(jax.random.key(0), (5, 3))
    tokens = jnp.array([[0, 4, 4], [5, -1, 1]])

    def plain(table):
        return table.at[tokens].get(**NAN_OUTSIDE)

    (got, pull), (wanted, pull_plain) = (
        jax.vjp(of, table) for of in (lambda table: rows_of(table, tokens), plain)
    )
    np.testing.assert_array_equal(got, wanted)
    for d_rows in (jnp.ones_like(got), jnp.zeros_like(got), jnp.full_like(got, jnp.nan)):
        np.testing.assert_array_equal(pull(d_rows)[0], pull_plain(d_rows)[0])


def test_the_gradient_of_a_table_is_not_there_before_it_is_made():
    table, weights = jnp.zeros((4096, 16)), jnp.zeros((16, 512))
    tokens = jnp.zeros((1, 256), jnp.int32)

    def norm(rows):
        def loss(table):
            return jnp.sum(jnp.tanh(rows(table) @ weights) ** 2)

        return lambda table: jnp.sum(jax.grad(loss)(table) ** 2)

    def temporaries(rows):
        compiled: Any = jax.jit(norm(rows)).lower(table).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    plain = temporaries(lambda table: table.at[tokens].get(**NAN_OUTSIDE))
    assert temporaries(lambda table: rows_of(table, tokens)) <= plain - table.nbytes / 2
