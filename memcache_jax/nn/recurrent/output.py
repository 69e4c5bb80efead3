"""From what memories return to a layer's output."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from memcache_jax import _checks
from memcache_jax._typing import Array, Float
from memcache_jax.nn.layers import Linear, as_laid
from memcache_jax.nn.recurrent.low_rank import LowRank, wide
from memcache_jax.nn.token_shift import LayerInput
from memcache_jax.sharding.names import partitioned

_GATES = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid, "linear": lambda x: x}


@dataclasses.dataclass(frozen=True)
class Output:
    """Norm and gate of what memories return, and the projection out.

    y = W_o (norm(y) * gate(x W_g)), or norm(y * gate(x W_g)) where ``gate_first``.

    Attributes:
      norm_groups: groups of channels that the norm is over, each head by default; None for no norm.
      epsilon: of the norm.
      norm: ``"rms"``, or ``"group"`` for a GroupNorm, which has a bias (arXiv:1803.08494).
      shared_scale: whether heads share the norm's scale, (v,); else it is one of all channels.
      gate: ``"silu"``, ``"sigmoid"`` or ``"linear"``; None for no gate.
      gate_low: makes x W_g of low rank.
      gate_scale: a constant factor of x W_g.
      gate_bias: whether a bias is added to x W_g first; that of ``gate_low`` is its own.
      gate_first: whether the gate comes before the norm.
      use_bias: whether the projection has a bias.
    """

    norm_groups: int | Literal["heads"] | None = "heads"
    epsilon: float = 1e-6
    norm: Literal["rms", "group"] = "rms"
    shared_scale: bool = True
    gate: Literal["silu", "sigmoid", "linear"] | None = "silu"
    gate_low: LowRank | None = None
    gate_scale: float = 1.0
    gate_bias: bool = False
    gate_first: bool = False
    use_bias: bool = False

    def __post_init__(self) -> None:
        _checks.check_choice("gate", self.gate, (None, *_GATES))
        _checks.check_choice("norm", self.norm, ("rms", "group"))
        if self.gate_low is not None:
            _checks.check_instance("gate_low", self.gate_low, LowRank, "a LowRank")
        if not isinstance(self.norm_groups, str):
            _checks.check_fields(self, sizes=("norm_groups",), optional=("norm_groups",))
        else:
            _checks.check_choice("norm_groups", self.norm_groups, ("heads",))
        _checks.check_fields(
            self,
            numbers=("epsilon", "gate_scale"),
            flags=("shared_scale", "gate_bias", "gate_first", "use_bias"),
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
            if output.norm == "group":
                zeros = partitioned(jax.nn.initializers.zeros, axis)
                self.bias = nnx.Param(zeros(rngs.params(), (size,), param_dtype))
        if output.gate is not None and output.gate_low is not None:
            self.gate = output.gate_low.build(features, inner, **options)
        elif output.gate is not None:
            axes, bias = ("embed", "heads"), output.gate_bias
            self.gate = Linear(features, inner, axes=axes, use_bias=bias, **options)
        self.out = Linear(
            inner, features, axes=("heads", "embed"), use_bias=output.use_bias, **options
        )

    def __call__(
        self,
        inputs: LayerInput,
        y: Float[Array, "b t h v"],
        bonus: Float[Array, "b t h v"] | None = None,
    ) -> Float[Array, "b t d"]:
        """Returns the layer's output, of its input and what the memories return.

        A bonus is added after the norm.
        """
        output, rows = self.output, y.reshape(*y.shape[:2], -1)
        gate: Any = None
        if output.gate is not None:
            project: Any = self.gate
            projected = project(inputs.x if output.gate_low is None else inputs)
            projected = wide(projected)
            if output.gate_scale != 1:
                projected = output.gate_scale * projected
            gate = _GATES[output.gate](projected)
        if gate is not None and output.gate_first:
            rows = wide(rows) * gate
        if output.norm_groups is not None:
            rows = self._normed(rows)
        if bonus is not None:
            rows = rows + bonus.reshape(rows.shape)
        if gate is not None and not output.gate_first:
            rows = wide(rows) * gate
        return self.out(rows.astype(y.dtype), as_laid(inputs.x))

    def _normed(self, rows: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        grouped = wide(rows).reshape(*rows.shape[:2], self.groups, -1)
        if self.output.norm == "group":
            grouped -= jnp.mean(grouped, axis=-1, keepdims=True)
        square = jnp.mean(jnp.square(grouped), axis=-1, keepdims=True)
        grouped *= jax.lax.rsqrt(square + self.output.epsilon)
        grouped *= self._per_channel(self.scale, grouped)
        if self.output.norm == "group":
            grouped += self._per_channel(self.bias, grouped)
        return grouped.reshape(rows.shape)

    def _per_channel(self, param: nnx.Param, grouped: Float[Array, "b t g c"]) -> Array:
        """A parameter of the norm, for rows by group."""
        value = param[...].astype(grouped.dtype)
        return value.reshape(1, 1, 1 if self.output.shared_scale else self.groups, -1)
