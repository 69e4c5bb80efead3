"""What blocks do to each token alone, or with the one before: gated, squared and shifted MLPs."""

import dataclasses
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from memcache_jax import _checks
from memcache_jax._typing import Array, Float, Int
from memcache_jax.nn.layers import Linear, SwiGLU
from memcache_jax.nn.token_shift import LayerInput, make_mix, next_previous, previous_tokens


@runtime_checkable
class FeedForward(Protocol):
    """Describes what a block does to each token, and perhaps to the one before: ``ChannelMix``."""

    def build(self, features: int, **options: Any) -> nnx.Module:
        """Returns a module (b, t, d) -> (b, t, d); options: dtype, param_dtype, rngs."""
        ...


@dataclasses.dataclass(frozen=True)
class GatedMLP:
    """scale W_down(silu(gate_scale W_gate x) * W_up x) (arXiv:2002.05202).

    ``hidden`` are the channels of the gate. With ``use_bias`` each product has a bias.
    """

    hidden: int
    use_bias: bool = False
    gate_scale: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        _checks.check_fields(
            self, sizes=("hidden",), numbers=("gate_scale", "scale"), flags=("use_bias",)
        )

    def build(self, features: int, **options: Any) -> SwiGLU:
        """Returns the module."""
        return SwiGLU(features, **vars(self), **options)


@dataclasses.dataclass(frozen=True)
class SquaredMLP:
    """W_down relu(W_up x)^2 (arXiv:2109.08668) of ``hidden`` channels."""

    hidden: int
    use_bias: bool = False

    def __post_init__(self) -> None:
        _checks.check_fields(self, sizes=("hidden",), flags=("use_bias",))

    def build(self, features: int, **options: Any) -> "SquaredReLU":
        """Returns the module."""
        return SquaredReLU(self, features, **options)


class SquaredReLU(nnx.Module):
    """The module of a ``SquaredMLP``."""

    def __init__(self, mlp: SquaredMLP, features: int, **options: Any) -> None:
        options["use_bias"] = mlp.use_bias
        self.up = Linear(features, mlp.hidden, axes=("embed", "mlp"), **options)
        self.down = Linear(mlp.hidden, features, axes=("mlp", "embed"), **options)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Applies the MLP to every token."""
        return self.down(jnp.square(jax.nn.relu(self.up(x))))


@dataclasses.dataclass(frozen=True)
class ChannelMix:
    """RWKV's W_down relu(W_up (x_t + mix (x_{t-1} - x_t)))^2 (arXiv:2503.14456).

    The mix is learned for each channel of the input, and ``hidden`` are those between.
    """

    hidden: int

    shifts: ClassVar[bool] = True
    """That it sees the token before, and takes document_ids."""

    def __post_init__(self) -> None:
        _checks.check_fields(self, sizes=("hidden",))

    def build(self, features: int, **options: Any) -> "ShiftedMLP":
        """Returns the module."""
        return ShiftedMLP(self, features, **options)


class ShiftedMLP(nnx.Module):
    """The module of a ``ChannelMix``."""

    def __init__(
        self,
        mlp: ChannelMix,
        features: int,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        options: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.features, self.dtype = features, param_dtype if dtype is None else dtype
        self.mix = make_mix(features, param_dtype, rngs)
        self.up = Linear(features, mlp.hidden, axes=("embed", "mlp"), **options)
        self.down = Linear(mlp.hidden, features, axes=("mlp", "embed"), **options)

    def __call__(
        self, x: Float[Array, "b t d"], document_ids: Int[Array, "b t"] | None = None
    ) -> Float[Array, "b t d"]:
        """Applies the MLP to every token and the one before it in its document."""
        return self._apply(LayerInput(x, previous_tokens(x, document_ids)))

    def init_tail(self, batch_size: int) -> Float[Array, "b 1 d"]:
        """Returns the input before the first token, zero."""
        return jnp.zeros((batch_size, 1, self.features), self.dtype)

    def extend(
        self, x: Float[Array, "b t d"], tail: Float[Array, "b 1 d"], lengths: Any
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b 1 d"]]:
        """Continues a stream: the outputs, and each row's last input that counts."""
        counts = jnp.full(len(x), x.shape[1]) if lengths is None else jnp.asarray(lengths)
        previous, tail = next_previous(x, tail, counts)
        return self._apply(LayerInput(x, previous)), tail

    def _apply(self, inputs: LayerInput) -> Float[Array, "b t d"]:
        return self.down(jnp.square(jax.nn.relu(self.up(inputs.mixed(self)))))
