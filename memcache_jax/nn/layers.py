"""Small layers that several modules share."""

import jax
import jax.numpy as jnp
from flax import nnx

from memcache_jax._typing import Array, Float


class CausalConv(nnx.Module):
    """Depthwise convolution over time that sees a token and the ``width - 1`` before it.

    Args:
      features: channels, d.
      width: taps; the last one multiplies the token itself.
      kernel_init: initialiser of the (width, d) kernel.
      param_dtype: dtype of the kernel.
      rngs: random keys.
    """

    def __init__(
        self,
        features: int,
        width: int,
        *,
        kernel_init: jax.nn.initializers.Initializer,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.kernel = nnx.Param(kernel_init(rngs.params(), (width, features), param_dtype))

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """y_t = sum over j of kernel[width - 1 - j] x_{t-j}."""
        kernel = self.kernel[...].astype(x.dtype)
        width, length = kernel.shape[0], x.shape[1]
        padded = jnp.pad(x, ((0, 0), (width - 1, 0), (0, 0)))
        return sum(padded[:, j : j + length] * kernel[None, None, j] for j in range(width))


class SwiGLU(nnx.Module):
    """Gated MLP, W_down(silu(W_gate x) * W_up x) (arXiv:2002.05202)."""

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        dtype: jnp.dtype | None = None,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        options = dict(use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.gate = nnx.Linear(features, hidden, **options)
        self.up = nnx.Linear(features, hidden, **options)
        self.down = nnx.Linear(hidden, features, **options)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def l2_normalize(x: Float[Array, "... k"], epsilon: float = 1e-6) -> Float[Array, "... k"]:
    """Returns x / |x| along the last axis, computed in float32 or wider."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    norm = jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * norm).astype(x.dtype)
