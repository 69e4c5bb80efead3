"""Parts of layers: the causal convolution and normalized rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memcache_jax.nn.layers import CausalConv, l2_normalize
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
