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


@dataclasses.dataclass(frozen=True)
class Trapezoid:
    """A step dt that a token and the one before share, for ``SWLA``: Mamba-3's discretization.

    With dt = softplus(x W + dt_bias) and s = sigmoid(x W_s): log_alpha = -exp(A_log) dt,
    beta = (1 - s) dt alpha and lam = s dt. At s = 1 it is ``TimeStep``, Euler's rule of Mamba-2.
    A_log and dt_bias are learned constants of each head, always float32.

    Attributes:
      turns: whether queries and keys turn too, their pair i by the angle of the sum over tokens of
        pi tanh(x W_i) dt: the paper's rotation, whose angles follow the data.
    """

    turns: bool = False

    def __post_init__(self) -> None:
        _checks.check_fields(self, flags=("turns",))

    @property
    def names(self) -> tuple[str, ...]:
        """The decay, and the weights of the token before and of the token."""
        return ("log_alpha", "beta", "lam")

    def build(self, in_features: int, heads: int, dim: int, **options: Any) -> "TrapezoidOf":
        """Returns the module."""
        if self.turns and dim % 2:
            raise ValueError(f"turns need keys of an even dim, got {dim}")
        return TrapezoidOf(in_features, heads, dim // 2 if self.turns else 0, **options)


class TrapezoidOf(nnx.Module):
    """The module of a ``Trapezoid``."""

    def __init__(self, in_features: int, heads: int, pairs: int, **options: Any) -> None:
        axes = ("embed", "heads")
        self.step, self.share = (Linear(in_features, heads, axes=axes, **options) for _ in range(2))
        if pairs:
            self.angle = Linear(in_features, pairs, axes=("embed", None), **options)
        self.A_log, self.dt_bias = first_steps(heads, heads)

    def __call__(self, inputs: LayerInput, heads: Heads, tokens: Tokens) -> dict[str, Array]:
        """Returns the coefficients."""
        logits, share = wide(self.step(inputs.x)), wide(self.share(inputs.x))
        bias, log_rate = (
            param[...].astype(logits.dtype)[None, None] for param in (self.dt_bias, self.A_log)
        )
        step = jax.nn.softplus(logits + bias)
        log_alpha = -jnp.exp(log_rate) * step
        made = {
            "log_alpha": log_alpha,
            "beta": jax.nn.sigmoid(-share) * step * jnp.exp(log_alpha),
            "lam": jax.nn.sigmoid(share) * step,
        }
        if hasattr(self, "angle"):
            half = jnp.tanh(wide(self.angle(inputs.x))) / 2  # pi is half a turn
            made["turns"] = step[..., None] * half[:, :, None]
        return made
