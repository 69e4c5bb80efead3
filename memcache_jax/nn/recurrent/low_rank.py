"""Projections of low rank, which coefficients, gates and values are made by."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from memcache_jax import _checks
from memcache_jax._typing import Array, Float
from memcache_jax.nn.layers import Linear
from memcache_jax.nn.token_shift import LayerInput, make_mix

_ACTIVATIONS = {"tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid}


@dataclasses.dataclass(frozen=True)
class LowRank:
    """W_2 f(W_1 x) + b, with ``rank`` channels between.

    Attributes:
      rank: the channels.
      activation: f, ``"tanh"`` or ``"sigmoid"``; None for none.
      use_bias: whether there is b.
      shift: whether x has a share of the token before, learned for each channel.
    """

    rank: int
    activation: Literal["tanh", "sigmoid"] | None = None
    use_bias: bool = True
    shift: bool = False

    def __post_init__(self) -> None:
        _checks.check_fields(self, sizes=("rank",), flags=("use_bias", "shift"))
        _checks.check_choice("activation", self.activation, (None, *_ACTIVATIONS))

    def build(self, in_features: int, out_features: int, **options: Any) -> "LowRankOf":
        """Returns the module; options are dtype, param_dtype and rngs."""
        return LowRankOf(self, in_features, out_features, **options)


class LowRankOf(nnx.Module):
    """The module of a ``LowRank``."""

    def __init__(
        self,
        low: LowRank,
        in_features: int,
        out_features: int,
        *,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        self.low = low
        options: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        if low.shift:
            self.mix = make_mix(in_features, param_dtype, rngs)
        self.down = Linear(in_features, low.rank, axes=("embed", None), **options)
        self.up = Linear(
            low.rank, out_features, axes=(None, "heads"), use_bias=low.use_bias, **options
        )

    def __call__(self, inputs: LayerInput) -> Float[Array, "b t e"]:
        """Returns the product."""
        hidden = self.down(inputs.mixed(self))
        if self.low.activation is not None:
            hidden = _ACTIVATIONS[self.low.activation](hidden)
        return self.up(hidden)


def wide(x: Array) -> Array:
    """In float32 or wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
