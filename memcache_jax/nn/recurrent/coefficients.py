"""From a layer's input to the coefficients of its write rule."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from memcache_jax import _checks
from memcache_jax._typing import Array, Float
from memcache_jax.nn.layers import Linear
from memcache_jax.sharding.names import partitioned

Heads = Callable[[Array], Array]
"""Splits (b, t, h k) into (b, t, h, k), as the tokens lie on a mesh."""


@runtime_checkable
class Coefficient(Protocol):
    """Describes one or several coefficients that are made together."""

    @property
    def names(self) -> tuple[str, ...]:
        """Those of the rule's controls."""
        ...

    def build(self, in_features: int, heads: int, dim: int, **options: Any) -> nnx.Module:
        """Returns a module ``(x, heads) -> {name: array}``, float32 or wider.

        ``dim`` is the key dimension; ``options`` are dtype, param_dtype and rngs.
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

    def __call__(self, x: Float[Array, "b t d"], heads: Heads) -> dict[str, Array]:
        """Returns the coefficient."""
        return {self.rate.name: self.rate.scale * jax.nn.sigmoid(_wide(self.linear(x)))}


@dataclasses.dataclass(frozen=True)
class TimeStepDecay:
    """log_alpha = -exp(A_log) softplus(x W + dt_bias), as Mamba and gated DeltaNet have it.

    A_log and dt_bias are learned constants of each head, always float32.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """The decay."""
        return ("log_alpha",)

    def build(self, in_features: int, heads: int, dim: int, **options: Any) -> "StepsOf":
        """Returns the module."""
        return StepsOf(in_features, heads, None, **options)


@dataclasses.dataclass(frozen=True)
class TimeStep:
    """A step dt that decays and weighs: log_alpha = -exp(A_log) dt, lam = dt (arXiv:2405.21060).

    dt = softplus(x W + dt_bias), limited to ``least`` and ``most``.
    """

    least: float = 0.0
    most: float = float("inf")

    def __post_init__(self) -> None:
        _checks.check_fields(self, numbers=("least",))
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
        return StepsOf(in_features, heads, (self.least, self.most), **options)


class StepsOf(nnx.Module):
    """The module of a ``TimeStepDecay`` or, with limits, of a ``TimeStep``."""

    def __init__(
        self, in_features: int, heads: int, limits: tuple[float, float] | None, **options: Any
    ) -> None:
        self.limits = limits
        self.linear = Linear(in_features, heads, axes=("embed", "heads"), **options)
        # Those of the papers: decay rates from 1 to 16, steps from 0.001 to 0.1.
        rates, steps = jnp.linspace(1.0, 16.0, heads), jnp.geomspace(1e-3, 0.1, heads)
        self.A_log = _constants(jnp.log(rates), "heads")
        self.dt_bias = _constants(jnp.log(jnp.expm1(steps)), "heads")

    def __call__(self, x: Float[Array, "b t d"], heads: Heads) -> dict[str, Array]:
        """Returns the coefficients."""
        logits = _wide(self.linear(x))
        step = jax.nn.softplus(logits + self.dt_bias[...].astype(logits.dtype)[None, None])
        if self.limits is not None:
            step = jnp.clip(step, *self.limits)
        rate = -jnp.exp(self.A_log[...].astype(step.dtype))
        out = {"log_alpha": step * rate[None, None]}
        return out if self.limits is None else out | {"lam": step}


@dataclasses.dataclass(frozen=True)
class LowRankDecay:
    """log_alpha = log_sigmoid(x W_1 W_2 + b) / divisor per key channel (arXiv:2312.06635).

    It is at least ``least``.
    """

    rank: int = 16
    divisor: float = 16.0
    least: float | None = None

    def __post_init__(self) -> None:
        _checks.check_fields(
            self, sizes=("rank",), numbers=("divisor", "least"), optional=("least",)
        )
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
        self.down = Linear(in_features, decay.rank, axes=("embed", None), **options)
        self.up = Linear(decay.rank, inner, axes=(None, "heads"), use_bias=True, **options)

    def __call__(self, x: Float[Array, "b t d"], heads: Heads) -> dict[str, Array]:
        """Returns the decays."""
        logits = heads(_wide(self.up(self.down(x))))
        log_alpha = jax.nn.log_sigmoid(logits) / self.decay.divisor
        least = self.decay.least
        return {"log_alpha": log_alpha if least is None else jnp.maximum(log_alpha, least)}


def _constants(values: Array, axis: str) -> nnx.Param:
    """Learned constants that start with these values: in bfloat16 a decay near 1 rounds to 1."""

    def init(key: Any, shape: Any, dtype: Any) -> Array:
        return values.astype(dtype)

    made = partitioned(init, axis)(jax.random.key(0), values.shape, jnp.float32)
    return nnx.Param(made)


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
