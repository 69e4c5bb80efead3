"""The coefficients of RWKV-7, whose state learns in context (arXiv:2503.14456)."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from memcache_jax import _checks
from memcache_jax._typing import Array
from memcache_jax.nn.layers import l2_normalize
from memcache_jax.nn.recurrent.coefficients import Heads, Tokens, check_low
from memcache_jax.nn.recurrent.low_rank import LowRank, wide
from memcache_jax.nn.token_shift import LayerInput
from memcache_jax.sharding.names import partitioned


@dataclasses.dataclass(frozen=True)
class LimitedDecay:
    """log_w = -rate sigmoid(low(x)) per key channel, which no token exceeds (arXiv:2503.14456)."""

    low: LowRank
    rate: float = math.exp(-0.5)
    name: str = "log_w"

    def __post_init__(self) -> None:
        check_low(self.low)
        _checks.check_instance("name", self.name, str, "the name of a control")
        _checks.check_fields(self, numbers=("rate",))
        if not self.rate > 0:
            raise ValueError(f"rate must be > 0, got {self.rate}")

    @property
    def names(self) -> tuple[str, ...]:
        """The one name."""
        return (self.name,)

    def build(self, in_features: int, heads: int, dim: int, **options: Any) -> "LimitedOf":
        """Returns the module."""
        return LimitedOf(self, in_features, heads * dim, **options)


class LimitedOf(nnx.Module):
    """The module of a ``LimitedDecay``."""

    def __init__(self, decay: LimitedDecay, in_features: int, inner: int, **options: Any) -> None:
        self.decay = decay
        self.low = decay.low.build(in_features, inner, **options)

    def __call__(self, inputs: LayerInput, heads: Heads, tokens: Tokens) -> dict[str, Array]:
        """Returns the decays."""
        logits = heads(wide(self.low(inputs)))
        return {self.decay.name: -self.decay.rate * jax.nn.sigmoid(logits)}


@dataclasses.dataclass(frozen=True)
class InContextRate:
    """RWKV-7's in-context learning rate, removal key and replacement key (arXiv:2503.14456).

    a = sigmoid(low(x)), kappa = k * removal / |k * removal|, and the key becomes
    k (1 + (a - 1) * replacement), with a learned number of each key channel in ``removal`` and in
    ``replacement``. ``epsilon`` is added to |k * removal|^2; None: the norm is at least 1e-12.
    """

    low: LowRank
    epsilon: float | None = 1e-6

    def __post_init__(self) -> None:
        check_low(self.low)
        _checks.check_fields(self, numbers=("epsilon",), optional=("epsilon",))

    @property
    def names(self) -> tuple[str, ...]:
        """How much is erased, and where."""
        return ("a", "kappa")

    def build(self, in_features: int, heads: int, dim: int, **options: Any) -> "InContextOf":
        """Returns the module."""
        return InContextOf(self, in_features, heads * dim, **options)


class InContextOf(nnx.Module):
    """The module of an ``InContextRate``."""

    def __init__(self, rate: InContextRate, in_features: int, inner: int, **options: Any) -> None:
        self.rate = rate
        self.low = rate.low.build(in_features, inner, **options)

        def constant(value: float) -> nnx.Param:
            init = partitioned(jax.nn.initializers.constant(value), "heads")
            return nnx.Param(init(options["rngs"].params(), (inner,), options["param_dtype"]))

        self.removal, self.replacement = constant(0.71), constant(1.02)  # as the paper's code

    def __call__(self, inputs: LayerInput, heads: Heads, tokens: Tokens) -> dict[str, Array]:
        """Returns the coefficients and the key."""
        key = wide(tokens["key"])
        a = jax.nn.sigmoid(heads(wide(self.low(inputs))))
        removal, replacement = (
            param[...].astype(key.dtype).reshape(1, 1, *key.shape[2:])
            for param in (self.removal, self.replacement)
        )
        removed, epsilon = key * removal, self.rate.epsilon
        if epsilon is None:
            norm = jnp.linalg.vector_norm(removed, axis=-1, keepdims=True)
            kappa = removed / jnp.maximum(norm, 1e-12)
        else:
            kappa = l2_normalize(removed, epsilon)
        new = key * (1 + (a - 1) * replacement)
        return {"a": a, "kappa": kappa, "key": new.astype(tokens["key"].dtype)}
