"""Short causal convolution followed by SiLU, with a derivative by hand for a CPU's sake."""

import jax
import jax.numpy as jnp

from memcache_jax._typing import Array, Float, Int
from memcache_jax._varying import alike


def conv_silu(
    x: Float[Array, "b t d"], kernel: Float[Array, "w d"], biased: bool = False
) -> Float[Array, "b t d"]:
    """y_t = silu(sum over j of kernel[j] x_{t - w + 1 + j}), x zero before the first token.

    If ``biased``, the last row of the kernel is no tap, but added to the sum.
    """
    return _conv_silu(*alike((x, *_taps_and_bias(kernel, biased))))


def _taps_and_bias(kernel: Array, biased: bool) -> tuple[Array, Array | None]:
    return (kernel[:-1], kernel[-1]) if biased else (kernel, None)


@jax.custom_vjp
def _conv_silu(x: Array, kernel: Array, bias: Array | None) -> Array:
    return jax.nn.silu(_convolved(x, kernel, bias))


def _convolved(x: Array, kernel: Array, bias: Array | None) -> Array:
    y = _weighted_shifts(x, kernel, before=kernel.shape[0] - 1)
    return y if bias is None else y + bias[None, None]


def document_conv_silu(
    x: Float[Array, "b t d"],
    kernel: Float[Array, "w d"],
    document_ids: Int[Array, "b t"],
    biased: bool = False,
) -> Float[Array, "b t d"]:
    """``conv_silu`` over the tokens of t's document alone."""
    kernel, bias = _taps_and_bias(kernel, biased)
    y, past = x * kernel[-1][None, None], x
    for back in range(1, kernel.shape[0]):
        # Cut off wherever a document begins: an id may come again.
        past = shift_in_documents(past, document_ids)
        y += past * kernel[-1 - back][None, None]
    return jax.nn.silu(y if bias is None else y + bias[None, None])


def shift(x: Float[Array, "b t ..."] | Int[Array, "b t"]) -> Array:
    """Each row's value one token before, zero for the first."""
    if not x.shape[1]:
        return x
    return jnp.pad(x[:, :-1], [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2))


def shift_in_documents(
    x: Float[Array, "b t d"], document_ids: Int[Array, "b t"]
) -> Float[Array, "b t d"]:
    """Each row's value one token before, zero for the first of a document."""
    goes_on = document_ids == shift(document_ids)
    return jnp.where(goes_on[..., None], shift(x), 0)


def _weighted_shifts(x: Array, kernel: Array, before: int) -> Array:
    """Sum over j of kernel[j] x_{t - before + j}, zero outside of x."""
    width, length = kernel.shape[0], x.shape[1]
    padded = jnp.pad(x, ((0, 0), (before, width - 1 - before), (0, 0)))
    return sum(
        (padded[:, j : j + length] * kernel[j][None, None] for j in range(width)),
        start=jnp.zeros((), x.dtype).reshape(1, 1, 1),
    )


def _forward(x: Array, kernel: Array, bias: Array | None) -> tuple[Array, tuple]:
    return _conv_silu(x, kernel, bias), (x, kernel, bias)


def _backward(residuals: tuple, d_y: Array) -> tuple[Array, Array, Array | None]:
    # Only the inputs are kept, and the kernel's gradient is a contraction, which XLA's CPU backend
    # does ten times faster than the sum that autodiff makes of a broadcast.
    x, kernel, bias = residuals
    width, length = kernel.shape[0], x.shape[1]
    _, pull = jax.vjp(jax.nn.silu, _convolved(x, kernel, bias))
    (d_y,) = pull(d_y)
    padded = jnp.pad(x, ((0, 0), (width - 1, 0), (0, 0)))
    taps = [jnp.einsum("btd,btd->d", padded[:, j : j + length], d_y) for j in range(width)]
    d_bias = None if bias is None else jnp.sum(d_y, axis=(0, 1))
    return _weighted_shifts(d_y, kernel[::-1], before=0), jnp.stack(taps), d_bias


_conv_silu.defvjp(_forward, _backward)
