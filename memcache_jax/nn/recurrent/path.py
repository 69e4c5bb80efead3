"""From a layer's input to its queries, keys or values."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from memcache_jax import _checks
from memcache_jax._typing import Array, Float, Int
from memcache_jax.nn.layers import CausalConv, Linear, l2_normalize
from memcache_jax.nn.norms import Norm
from memcache_jax.nn.recurrent.low_rank import LowRank
from memcache_jax.nn.rotary import rotate
from memcache_jax.nn.token_shift import LayerInput, make_mix

_ACTIVATIONS = {"silu": jax.nn.silu, "relu": jax.nn.relu, "elu": lambda x: jax.nn.elu(x) + 1}


@dataclasses.dataclass(frozen=True)
class Path:
    """How queries, keys or values are made.

    A projection; then, each optional and in this order: a causal depthwise convolution with SiLU,
    an activation, a norm, rotary positions, a factor.

    Attributes:
      heads: number of heads. Of queries and keys it may divide the layer's: head i of the layer
        then has head i // (layer's heads / heads) of the path.
      dim: dimension of a head.
      use_bias: whether the projection has a bias.
      shift: whether the input has a share of the token before, learned for each channel.
      first: mixes in the same path of the model's first layer, p + sigmoid(first(x)) (p_first - p),
        as RWKV-7 does with values (arXiv:2503.14456); None for no mixing.
      projection_scale: a constant factor of the projection.
      conv_width: taps of the convolution; None for no convolution and no SiLU.
      conv_bias: whether the convolution has a bias.
      activation: ``"silu"``, ``"relu"`` or ``"elu"``, which is elu(x) + 1; None for none.
      norm: ``"l2"``, x / sqrt(sum x^2 + 1e-6); ``"rms"``, x / sqrt(mean x^2 + 1e-5) times a
        learned scale (dim,) that heads share; or ``"sum"``, x / sum x; None for none.
      scale: a constant factor.
      rope_base: wavelength base of rotary positions; None for no positions.
    """

    heads: int
    dim: int
    use_bias: bool = False
    shift: bool = False
    first: LowRank | None = None
    projection_scale: float = 1.0
    conv_width: int | None = None
    conv_bias: bool = False
    activation: Literal["silu", "relu", "elu"] | None = None
    norm: Literal["l2", "rms", "sum"] | None = None
    scale: float = 1.0
    rope_base: float | None = None

    def __post_init__(self) -> None:
        _checks.check_fields(
            self,
            sizes=("heads", "dim", "conv_width"),
            numbers=("projection_scale", "scale", "rope_base"),
            flags=("use_bias", "shift", "conv_bias"),
            optional=("conv_width", "rope_base"),
        )
        if self.first is not None:
            _checks.check_instance("first", self.first, LowRank, "a LowRank")
        _checks.check_choice("activation", self.activation, (None, *_ACTIVATIONS))
        _checks.check_choice("norm", self.norm, (None, "l2", "rms", "sum"))
        if self.rope_base is not None and (self.dim % 2 or self.rope_base <= 0):
            raise ValueError(
                f"rotary positions need an even dim and rope_base > 0, got {self.dim} and "
                f"{self.rope_base}"
            )
        if self.conv_bias and self.conv_width is None:
            raise ValueError("conv_bias needs a conv_width, got None")

    def build(self, in_features: int, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs) -> "Rows":
        """Returns the module."""
        return Rows(self, in_features, dtype=dtype, param_dtype=param_dtype, rngs=rngs)


class Rows(nnx.Module):
    """The module of a ``Path``."""

    def __init__(
        self, path: Path, in_features: int, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs
    ) -> None:
        self.path = path
        inner = path.heads * path.dim
        options: dict[str, Any] = dict(param_dtype=param_dtype, rngs=rngs)
        if path.shift:
            self.mix = make_mix(in_features, param_dtype, rngs)
        if path.first is not None:
            self.first = path.first.build(in_features, inner, dtype=dtype, **options)
        self.linear = Linear(
            in_features,
            inner,
            axes=("embed", "heads"),
            use_bias=path.use_bias,
            dtype=dtype,
            **options,
        )
        if path.norm == "rms":
            self.norm = Norm(epsilon=1e-5).build(path.dim, dtype=dtype, **options)
        if path.conv_width:
            init = jax.nn.initializers.normal(path.conv_width**-0.5)
            self.conv = CausalConv(
                inner, path.conv_width, kernel_init=init, use_bias=path.conv_bias, **options
            )

    def project(
        self, inputs: LayerInput, first: Float[Array, "b t hk"] | None
    ) -> Float[Array, "b t hk"]:
        """What precedes the convolution; ``first`` is that of the model's first layer."""
        x = inputs.mixed(self)
        rows = self.linear(x)
        if self.path.projection_scale != 1:
            rows = self.path.projection_scale * rows
        if self.path.first is None:
            return rows
        if first is None:
            raise ValueError(
                "this layer mixes its values with those of the model's first layer: call it as "
                "part of a LanguageModel"
            )
        share = jax.nn.sigmoid(self.first(LayerInput(x)))
        return rows + share * (first.astype(rows.dtype) - rows)

    @property
    def tail_shape(self) -> tuple[int, int]:
        """The tokens that a stream keeps for the convolution, and their channels."""
        path = self.path
        return max((path.conv_width or 1) - 1, 0), path.heads * path.dim

    def finish(
        self, rows: Float[Array, "b t h k"], position: Int[Array, "b t"] | None
    ) -> Float[Array, "b t h k"]:
        """What follows the convolution; positions count from each row's first token if None."""
        path = self.path
        if path.activation is not None:
            rows = _ACTIVATIONS[path.activation](rows)
        if path.norm == "l2":
            rows = l2_normalize(rows)
        elif path.norm == "rms":
            rows = self.norm(rows)
        elif path.norm == "sum":
            rows = rows / jnp.sum(rows, axis=-1, keepdims=True)
        if path.rope_base is not None:
            rows = rotate(rows, path.rope_base, position)
        return rows if path.scale == 1 else rows * path.scale
