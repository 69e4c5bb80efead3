"""The step of Mamba-3, which weighs a token and the one before by the trapezoidal rule."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from memcache_jax import _checks
from memcache_jax._typing import Array
from memcache_jax.nn.layers import Linear
from memcache_jax.nn.recurrent.coefficients import Heads, Tokens, first_steps
from memcache_jax.nn.recurrent.low_rank import wide
from memcache_jax.nn.token_shift import LayerInput

_LEAST_RATE = 1e-4  # of a head that decays


@dataclasses.dataclass(frozen=True)
class Trapezoid:
    """A step dt that a token and the one before share, for ``SWLA``: Mamba-3's discretization.

    With dt = softplus(x W + dt_bias) and s = sigmoid(x W_s): log_alpha = A dt,
    beta = (1 - s) dt alpha and lam = s dt. At s = 1 it is ``TimeStep``, Euler's rule of Mamba-2.
    A = -exp(A_log) is a constant of each head, or follows the data. A_log and dt_bias are learned,
    always float32.

    Attributes:
      rates: whether A follows the data, A = -max(softplus(x W_A), 1e-4), as in Mamba-3.
      turns: whether queries and keys turn too, their pair i by the angle of the sum over tokens of
        pi tanh(x W_i) dt: the paper's rotation, whose angles follow the data.
    """

    rates: bool = False
    turns: bool = False

    def __post_init__(self) -> None:
        _checks.check_fields(self, flags=("rates", "turns"))

    @property
    def names(self) -> tuple[str, ...]:
        """The decay, and the weights of the token before and of the token."""
        return ("log_alpha", "beta", "lam")

    def build(self, in_features: int, heads: int, dim: int, **options: Any) -> "TrapezoidOf":
        """Returns the module."""
        if self.turns and dim % 2:
            raise ValueError(f"turns need keys of an even dim, got {dim}")
        return TrapezoidOf(self, in_features, heads, dim // 2, **options)


class TrapezoidOf(nnx.Module):
    """The module of a ``Trapezoid``."""

    def __init__(
        self, part: Trapezoid, in_features: int, heads: int, pairs: int, **options: Any
    ) -> None:
        axes = ("embed", "heads")
        self.step, self.share = (Linear(in_features, heads, axes=axes, **options) for _ in range(2))
        if part.turns:
            self.angle = Linear(in_features, pairs, axes=("embed", None), **options)
        log_rate, self.dt_bias = first_steps(heads, heads)
        if part.rates:
            self.rate = Linear(in_features, heads, axes=axes, **options)
        else:
            self.A_log = log_rate

    def __call__(self, inputs: LayerInput, heads: Heads, tokens: Tokens) -> dict[str, Array]:
        """Returns the coefficients."""
        logits, share = wide(self.step(inputs.x)), wide(self.share(inputs.x))
        step = jax.nn.softplus(logits + self.dt_bias[...].astype(logits.dtype)[None, None])
        if hasattr(self, "rate"):
            rate = jnp.maximum(jax.nn.softplus(wide(self.rate(inputs.x))), _LEAST_RATE)
        else:
            rate = jnp.exp(self.A_log[...].astype(logits.dtype))[None, None]
        log_alpha = -rate * step
        made = {
            "log_alpha": log_alpha,
            "beta": jax.nn.sigmoid(-share) * step * jnp.exp(log_alpha),
            "lam": jax.nn.sigmoid(share) * step,
        }
        if hasattr(self, "angle"):
            half = jnp.tanh(wide(self.angle(inputs.x))) / 2  # pi is half a turn
            made["turns"] = step[..., None] * half[:, :, None]
        return made
