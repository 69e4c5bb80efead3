"""From a layer's input to the coefficients of its write rule."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from memcache_jax import _checks
from memcache_jax._typing import Array
from memcache_jax.nn.layers import Linear
from memcache_jax.nn.recurrent.low_rank import LowRank, wide
from memcache_jax.nn.token_shift import LayerInput
from memcache_jax.sharding.names import partitioned

Heads = Callable[[Array], Array]
"""Splits (b, t, h k) into (b, t, h, k), as the tokens lie on a mesh."""

Tokens = Mapping[str, Array]
"""The layer's queries, keys and values, by the argument's name."""


@runtime_checkable
class Coefficient(Protocol):
    """Describes one or several coefficients that are made together."""

    @property
    def names(self) -> tuple[str, ...]:
        """Those of the rule's controls."""
        ...

    def build(self, in_features: int, heads: int, dim: int, **options: Any) -> nnx.Module:
        """Returns a module ``(inputs, heads, tokens) -> {name: array}``, float32 or wider.

        It may return another ``key`` beside them, and, if it has a true attribute ``turns``,
        ``turns`` (b, t, h, k / 2), by which queries and keys turn at each token, 1 for a whole
        turn. ``inputs`` is a ``LayerInput``, ``dim`` is the key dimension; ``options`` are dtype,
        param_dtype and rngs.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Rate:
    """scale * sigmoid(x W), one per head, such as beta of a delta rule."""

    name: str = "beta"
    scale: float = 1.0

    def __post_init__(self) -> None:
        _checks.check_instance("name", self.name, str, "the name of a control")
        _checks.check_fields(self, numbers=("scale",))

    @property
    def names(self) -> tuple[str, ...]:
        """The one name."""
        return (self.name,)

    def build(self, in_features: int, heads: int, dim: int, **options: Any) -> "RateOf":
        """Returns the module."""
        return RateOf(self, in_features, heads, **options)


class RateOf(nnx.Module):
    """The module of a ``Rate``."""

    def __init__(self, rate: Rate, in_features: int, heads: int, **options: Any) -> None:
        self.rate = rate
        self.linear = Linear(in_features, heads, axes=("embed", "heads"), **options)

    def __call__(self, inputs: LayerInput, heads: Heads, tokens: Tokens) -> dict[str, Array]:
        """Returns the coefficient."""
        logits = wide(self.linear(inputs.x))
        return {self.rate.name: self.rate.scale * jax.nn.sigmoid(logits)}


@dataclasses.dataclass(frozen=True)
class TimeStepDecay:
    """log_alpha = -exp(A_log) softplus(x W + dt_bias), as Mamba and gated DeltaNet have it.

    A_log and dt_bias are learned constants of each head, always float32. With ``low``, x W is its
    product, log_alpha is one for each key channel, and so is dt_bias, as in KDA (arXiv:2510.26692).
    """

    low: LowRank | None = None

    def __post_init__(self) -> None:
        check_low(self.low, optional=True)

    @property
    def names(self) -> tuple[str, ...]:
        """The decay."""
        return ("log_alpha",)

    def build(self, in_features: int, heads: int, dim: int, **options: Any) -> "StepsOf":
        """Returns the module."""
        return StepsOf(self, in_features, heads, dim, **options)


@dataclasses.dataclass(frozen=True)
class TimeStep:
    """A step dt that decays and weighs: log_alpha = -exp(A_log) dt, lam = dt (arXiv:2405.21060).

    dt = softplus(scale x W + dt_bias), limited to ``least`` and ``most``. With ``use_bias`` x W has
    a bias of its own.
    """

    least: float = 0.0
    most: float = float("inf")
    scale: float = 1.0
    use_bias: bool = False

    def __post_init__(self) -> None:
        _checks.check_fields(self, numbers=("least", "scale"), flags=("use_bias",))
        if self.most != float("inf"):
            _checks.check_fields(self, numbers=("most",))
        if not self.least <= self.most:
            raise ValueError(f"least must not exceed most, got {self.least} and {self.most}")

    @property
    def names(self) -> tuple[str, ...]:
        """The decay and the weight."""
        return ("log_alpha", "lam")

    def build(self, in_features: int, heads: int, dim: int, **options: Any) -> "StepsOf":
        """Returns the module."""
        return StepsOf(self, in_features, heads, dim, **options)


class StepsOf(nnx.Module):
    """The module of a ``TimeStepDecay`` or a ``TimeStep``."""

    def __init__(
        self,
        steps: TimeStepDecay | TimeStep,
        in_features: int,
        heads: int,
        dim: int,
        **options: Any,
    ) -> None:
        self.steps, low = steps, getattr(steps, "low", None)
        if low is None:
            axes, bias = ("embed", "heads"), getattr(steps, "use_bias", False)
            self.linear = Linear(in_features, heads, axes=axes, use_bias=bias, **options)
        else:
            self.low = low.build(in_features, heads * dim, **options)
        self.A_log, self.dt_bias = first_steps(heads, heads if low is None else heads * dim)

    def __call__(self, inputs: LayerInput, heads: Heads, tokens: Tokens) -> dict[str, Array]:
        """Returns the coefficients."""
        by_channel = hasattr(self, "low")
        logits = wide(self.low(inputs) if by_channel else self.linear(inputs.x))
        steps = self.steps
        if isinstance(steps, TimeStep) and steps.scale != 1:
            logits *= steps.scale
        step = jax.nn.softplus(logits + self.dt_bias[...].astype(logits.dtype)[None, None])
        rate = -jnp.exp(self.A_log[...].astype(step.dtype))
        if by_channel:
            return {"log_alpha": heads(step) * rate[None, None, :, None]}
        if not isinstance(steps, TimeStep):
            return {"log_alpha": step * rate[None, None]}
        step = jnp.clip(step, steps.least, steps.most)
        return {"log_alpha": step * rate[None, None], "lam": step}


@dataclasses.dataclass(frozen=True)
class LowRankDecay:
    """log_alpha = log_sigmoid(low(x)) / divisor per key channel (arXiv:2312.06635).

    It is at least ``least``.
    """

    low: LowRank
    divisor: float = 16.0
    least: float | None = None

    def __post_init__(self) -> None:
        check_low(self.low)
        _checks.check_fields(self, numbers=("divisor", "least"), optional=("least",))
        if not self.divisor > 0:
            raise ValueError(f"divisor must be > 0, got {self.divisor}")

    @property
    def names(self) -> tuple[str, ...]:
        """The decay."""
        return ("log_alpha",)

    def build(self, in_features: int, heads: int, dim: int, **options: Any) -> "DecaysOf":
        """Returns the module."""
        return DecaysOf(self, in_features, heads * dim, **options)


class DecaysOf(nnx.Module):
    """The module of a ``LowRankDecay``."""

    def __init__(self, decay: LowRankDecay, in_features: int, inner: int, **options: Any) -> None:
        self.decay = decay
        self.low = decay.low.build(in_features, inner, **options)

    def __call__(self, inputs: LayerInput, heads: Heads, tokens: Tokens) -> dict[str, Array]:
        """Returns the decays."""
        log_alpha = jax.nn.log_sigmoid(heads(wide(self.low(inputs)))) / self.decay.divisor
        least = self.decay.least
        return {"log_alpha": log_alpha if least is None else jnp.maximum(log_alpha, least)}


def check_low(low: Any, optional: bool = False) -> None:
    """Raises ValueError unless ``low`` is a LowRank."""
    if not (optional and low is None):
        _checks.check_instance("low", low, LowRank, "a LowRank")


def first_steps(heads: int, steps: int) -> tuple[nnx.Param, nnx.Param]:
    """A_log and dt_bias as papers begin with them: rates from 1 to 16, steps from 0.001 to 0.1."""
    rates, first = jnp.linspace(1.0, 16.0, heads), jnp.geomspace(1e-3, 0.1, steps)
    return _constants(jnp.log(rates), "heads"), _constants(jnp.log(jnp.expm1(first)), "heads")


def _constants(values: Array, axis: str) -> nnx.Param:
    """Learned constants that start with these values: in bfloat16 a decay near 1 rounds to 1."""

    def init(key: Any, shape: Any, dtype: Any) -> Array:
        return values.astype(dtype)

    made = partitioned(init, axis)(jax.random.key(0), values.shape, jnp.float32)
    return nnx.Param(made)
