"""Short causal convolution followed by SiLU, with a derivative by hand for a CPU's sake."""

import jax
import jax.numpy as jnp

from memcache_jax._typing import Array, Float, Int
from memcache_jax._varying import alike


def conv_silu(x: Float[Array, "b t d"], kernel: Float[Array, "w d"]) -> Float[Array, "b t d"]:
    """y_t = silu(sum over j of kernel[j] x_{t - w + 1 + j}), x zero before the first token."""
    return _conv_silu(*alike((x, kernel)))


@jax.custom_vjp
def _conv_silu(x: Array, kernel: Array) -> Array:
    return jax.nn.silu(_weighted_shifts(x, kernel, before=kernel.shape[0] - 1))


def document_conv_silu(
    x: Float[Array, "b t d"], kernel: Float[Array, "w d"], document_ids: Int[Array, "b t"]
) -> Float[Array, "b t d"]:
    """``conv_silu`` over the tokens of t's document alone."""
    y, past = x * kernel[-1][None, None], x
    goes_on = document_ids == _shift(document_ids)
    for back in range(1, kernel.shape[0]):
        # Cut off wherever a document begins: an id may come again.
        past = jnp.where(goes_on[..., None], _shift(past), 0)
        y += past * kernel[-1 - back][None, None]
    return jax.nn.silu(y)


def _shift(x: Float[Array, "b t ..."] | Int[Array, "b t"]) -> Array:
    """Each row's value one token before, zero for the first."""
    return jnp.pad(x[:, :-1], [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2))


def _weighted_shifts(x: Array, kernel: Array, before: int) -> Array:
    """Sum over j of kernel[j] x_{t - before + j}, zero outside of x."""
    width, length = kernel.shape[0], x.shape[1]
    padded = jnp.pad(x, ((0, 0), (before, width - 1 - before), (0, 0)))
    return sum(
        (padded[:, j : j + length] * kernel[j][None, None] for j in range(width)),
        start=jnp.zeros((), x.dtype).reshape(1, 1, 1),
    )


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _conv_silu(x, kernel), (x, kernel)


def _backward(residuals: tuple[Array, Array], d_y: Array) -> tuple[Array, Array]:
    # Only the inputs are kept, and the kernel's gradient is a contraction, which XLA's CPU backend
    # does ten times faster than the sum that autodiff makes of a broadcast.
    x, kernel = residuals
    width, length = kernel.shape[0], x.shape[1]
    _, pull = jax.vjp(jax.nn.silu, _weighted_shifts(x, kernel, before=width - 1))
    (d_y,) = pull(d_y)
    padded = jnp.pad(x, ((0, 0), (width - 1, 0), (0, 0)))
    taps = [jnp.einsum("btd,btd->d", padded[:, j : j + length], d_y) for j in range(width)]
    return _weighted_shifts(d_y, kernel[::-1], before=0), jnp.stack(taps)


_conv_silu.defvjp(_forward, _backward)
