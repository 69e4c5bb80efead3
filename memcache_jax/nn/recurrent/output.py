"""From what memories return to a layer's output."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from memcache_jax import _checks
from memcache_jax._typing import Array, Float
from memcache_jax.nn.layers import Linear, as_laid
from memcache_jax.sharding.names import partitioned

_GATES = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}


@dataclasses.dataclass(frozen=True)
class Output:
    """Norm and gate of what memories return, and the projection out.

    y = W_o (norm(y) * gate(x W_g)), or norm(y * gate(x W_g)) where ``gate_first``.

    Attributes:
      norm_groups: groups of channels that the RMSNorm is over, each head by default; None for no
        norm.
      epsilon: of the norm.
      shared_scale: whether heads share the norm's scale, (v,); else it is one of all channels.
      gate: ``"silu"`` or ``"sigmoid"``; None for no gate.
      gate_first: whether the gate comes before the norm.
      use_bias: whether the projection has a bias.
    """

    norm_groups: int | Literal["heads"] | None = "heads"
    epsilon: float = 1e-6
    shared_scale: bool = True
    gate: Literal["silu", "sigmoid"] | None = "silu"
    gate_first: bool = False
    use_bias: bool = False

    def __post_init__(self) -> None:
        _checks.check_choice("gate", self.gate, (None, *_GATES))
        if not isinstance(self.norm_groups, str):
            _checks.check_fields(self, sizes=("norm_groups",), optional=("norm_groups",))
        else:
            _checks.check_choice("norm_groups", self.norm_groups, ("heads",))
        _checks.check_fields(
            self, numbers=("epsilon",), flags=("shared_scale", "gate_first", "use_bias")
        )

    def build(self, features: int, heads: int, dim: int, **options: Any) -> "OutputOf":
        """Returns the module."""
        return OutputOf(self, features, heads, dim, **options)


class OutputOf(nnx.Module):
    """The module of an ``Output``."""

    def __init__(
        self,
        output: Output,
        features: int,
        heads: int,
        dim: int,
        *,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        self.output, inner = output, heads * dim
        options: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        groups = output.norm_groups
        if groups is not None:
            self.groups = heads if groups == "heads" else groups
            if inner % self.groups:
                raise ValueError(f"norm_groups={self.groups} must divide {heads} x {dim} channels")
            size, axis = (dim, None) if output.shared_scale else (inner, "heads")
            ones = partitioned(jax.nn.initializers.ones, axis)
            self.scale = nnx.Param(ones(rngs.params(), (size,), param_dtype))
        if output.gate is not None:
            self.gate = Linear(features, inner, axes=("embed", "heads"), **options)
        self.out = Linear(
            inner, features, axes=("heads", "embed"), use_bias=output.use_bias, **options
        )

    def __call__(self, x: Float[Array, "b t d"], y: Float[Array, "b t h v"]) -> Array:
        """Returns the layer's output, of its input and what the memories return."""
        rows = y.reshape(*y.shape[:2], -1)
        output, gate = self.output, None
        if output.gate is not None:
            gate = _GATES[output.gate](_wide(self.gate(x)))
        if gate is not None and output.gate_first:
            rows = _wide(rows) * gate
        if output.norm_groups is not None:
            rows = self._normed(rows)
        if gate is not None and not output.gate_first:
            rows = _wide(rows) * gate
        return self.out(rows.astype(y.dtype), as_laid(x))

    def _normed(self, rows: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        grouped = _wide(rows).reshape(*rows.shape[:2], self.groups, -1)
        square = jnp.mean(jnp.square(grouped), axis=-1, keepdims=True)
        grouped *= jax.lax.rsqrt(square + self.output.epsilon)
        scale = self.scale[...].astype(grouped.dtype)
        if not self.output.shared_scale:
            scale = scale.reshape(self.groups, -1)
        shape = (1,) * (4 - scale.ndim) + scale.shape
        return (grouped * scale.reshape(shape)).reshape(rows.shape)


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
