"""Attention as published models have it: grouped heads, norms of queries and keys, a gate."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from memcache_jax import _checks
from memcache_jax._typing import Array, Float, Int
from memcache_jax.nn.attention import Attention
from memcache_jax.nn.layers import Linear
from memcache_jax.nn.norms import Norm
from memcache_jax.nn.rotary import rotate
from memcache_jax.sharding.division import Division


@dataclasses.dataclass(frozen=True)
class GroupedAttentionMixer:
    """Blocks mix tokens with ``GroupedAttention``.

    Attributes:
      num_heads: heads of queries.
      num_kv_heads: heads of keys and values, each for as many heads of queries.
      head_dim: dimension of a head.
      rope_base: wavelength base of rotary positions; None for no positions.
      rope_fraction: the part of a head's channels, the first, that have positions.
      norm: of queries and keys; None for none.
      norm_over: whether it is over the channels of each ``"head"`` or over ``"all"`` of them.
      gate: whether the output is multiplied by sigmoid(x W_g).
      scale: of scores; head_dim^-0.5 by default.
      window: how many tokens a token sees, itself included; None for all.
      use_bias: whether queries, keys, values and the gate have a bias.
      use_out_bias: whether the output has.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_base: float | None = 10_000.0
    rope_fraction: float = 1.0
    norm: Norm | None = None
    norm_over: Literal["head", "all"] = "head"
    gate: bool = False
    scale: float | None = None
    window: int | None = None
    use_bias: bool = False
    use_out_bias: bool = False

    def __post_init__(self) -> None:
        _checks.check_fields(
            self,
            sizes=("num_heads", "num_kv_heads", "head_dim", "window"),
            numbers=("rope_base", "rope_fraction", "scale"),
            flags=("gate", "use_bias", "use_out_bias"),
            optional=("window", "rope_base", "scale"),
        )
        if self.norm is not None:
            _checks.check_instance("norm", self.norm, Norm, "an mc.nn.Norm")
        if not 0 < self.rope_fraction <= 1:
            raise ValueError(f"rope_fraction must be in (0, 1], got {self.rope_fraction}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}"
            )
        _checks.check_choice("norm_over", self.norm_over, ("head", "all"))
        if self.rope_base is not None and (self.turned % 2 or self.rope_base <= 0):
            raise ValueError(
                f"rotary positions need an even number of channels and rope_base > 0, got "
                f"{self.turned} and {self.rope_base}"
            )

    @property
    def turned(self) -> int:
        """Channels of a head that have rotary positions."""
        return int(self.head_dim * self.rope_fraction)

    def build(
        self,
        in_features: int,
        num_heads: int | None = None,
        *,
        head_dim: Any = None,
        **options: Any,
    ) -> "GroupedAttention":
        """Returns the layer."""
        del num_heads, head_dim
        return GroupedAttention(self, in_features, **options)


class GroupedAttention(Attention):
    """Causal softmax attention of a ``GroupedAttentionMixer``'s kind.

    Example:
      >>> import jax.numpy as jnp, memcache_jax as mc
      >>> from flax import nnx
      >>> mixer = mc.nn.GroupedAttentionMixer(4, 2, 8, norm=mc.nn.Norm(), gate=True)
      >>> mixer.build(32, rngs=nnx.Rngs(0))(jnp.ones((1, 10, 32))).shape
      (1, 10, 32)
    """

    def __init__(
        self,
        mixer: GroupedAttentionMixer,
        in_features: int,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.mixer, self.in_features = mixer, _checks.check_integer("in_features", in_features)
        self.num_heads, self.num_kv_heads = mixer.num_heads, mixer.num_kv_heads
        self.head_dim, self.window, self.implementation = mixer.head_dim, mixer.window, None
        self.dtype, self.param_dtype = dtype, param_dtype
        options: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        inner, of_keys = (n * mixer.head_dim for n in (mixer.num_heads, mixer.num_kv_heads))

        def linear(size: int, use_bias: bool) -> Linear:
            return Linear(in_features, size, axes=("embed", "heads"), use_bias=use_bias, **options)

        self.query = linear(inner, mixer.use_bias)
        self.key, self.value = (linear(of_keys, mixer.use_bias) for _ in range(2))
        if mixer.norm is not None:
            sizes = (inner, of_keys) if mixer.norm_over == "all" else (mixer.head_dim,) * 2
            self.query_norm, self.key_norm = (mixer.norm.build(n, **options) for n in sizes)
        if mixer.gate:
            self.gate = linear(inner, mixer.use_bias)
        self.out = Linear(
            inner, in_features, axes=("heads", "embed"), use_bias=mixer.use_out_bias, **options
        )

    def _rows(
        self, x: Float[Array, "b t d"], *others: tuple[Any, str]
    ) -> tuple[list[Array], Division | None]:
        (query, key, value), division = super()._rows(x, *others)
        mixer = self.mixer
        if mixer.norm is not None:
            norms = self.query_norm, self.key_norm
            query, key = (
                norm(rows.reshape(*rows.shape[:2], -1)).reshape(rows.shape)
                if mixer.norm_over == "all"
                else norm(rows)
                for norm, rows in zip(norms, (query, key), strict=True)
            )
        if mixer.scale is not None:
            query = query * (mixer.scale * mixer.head_dim**0.5)
        return [query, key, value], division

    def _turn(
        self, rows: Float[Array, "b t h k"], position: Int[Array, "_ t"] | None
    ) -> Float[Array, "b t h k"]:
        mixer = self.mixer
        if mixer.rope_base is None:
            return rows
        if mixer.turned == mixer.head_dim:
            return rotate(rows, mixer.rope_base, position)
        turned, others = rows[..., : mixer.turned], rows[..., mixer.turned :]
        return jnp.concatenate([rotate(turned, mixer.rope_base, position), others], axis=-1)

    def _output(self, x: Float[Array, "b t d"], y: Float[Array, "b t h k"]) -> Array:
        if self.mixer.gate:
            y = y * jax.nn.sigmoid(self.gate(x)).reshape(y.shape)
        return super()._output(x, y)
