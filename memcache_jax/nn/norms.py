"""Norms over the last axis, as published models have them."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from memcache_jax import _checks
from memcache_jax._typing import Array, Float


@dataclasses.dataclass(frozen=True)
class Norm:
    """RMSNorm, x / rms(x) (offset + scale), or LayerNorm, (x - mean) / std scale + bias.

    Attributes:
      kind: ``"rms"`` (arXiv:1910.07467) or ``"layer"`` (arXiv:1607.06450).
      epsilon: added to the mean square.
      offset: of an RMSNorm's scale, which is then near 0: some models store it less 1.
    """

    kind: Literal["rms", "layer"] = "rms"
    epsilon: float = 1e-6
    offset: float = 0.0

    def __post_init__(self) -> None:
        _checks.check_choice("kind", self.kind, ("rms", "layer"))
        _checks.check_fields(self, numbers=("epsilon", "offset"))
        _checks.check_number("epsilon", self.epsilon, "at least 0", lambda x: x >= 0)
        if self.kind == "layer" and self.offset:
            raise ValueError(f"a LayerNorm's scale has no offset, got {self.offset}")

    def build(
        self, features: int, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs
    ) -> nnx.RMSNorm | nnx.LayerNorm:
        """Returns the module, whose parameters are those of Flax's norms."""
        options: dict[str, Any] = dict(
            epsilon=self.epsilon, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        if self.kind == "layer":
            return nnx.LayerNorm(features, **options)
        if not self.offset:
            return nnx.RMSNorm(features, **options)
        init = jax.nn.initializers.constant(1 - self.offset)
        return OffsetRMSNorm(features, scale_init=init, offset=self.offset, **options)


class OffsetRMSNorm(nnx.RMSNorm):
    """``nnx.RMSNorm`` with a number added to its scale."""

    def __init__(self, num_features: int, *, offset: float, **options: Any) -> None:
        super().__init__(num_features, **options)
        self.offset = offset

    def __call__(self, x: Float[Array, "... d"], mask: Any = None) -> Float[Array, "... d"]:
        """Returns x / rms(x) (offset + scale)."""
        del mask
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        scale: Any = self.scale
        scale = self.offset + scale[...].astype(wide.dtype)
        square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        y = wide * jax.lax.rsqrt(square + self.epsilon)
        y *= scale.reshape((1,) * (y.ndim - 1) + scale.shape)
        return y.astype(self.dtype or jnp.promote_types(x.dtype, self.param_dtype))
