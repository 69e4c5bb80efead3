"""Decays that are constants, and decays that make the key: Lightning Attention and HGRN2."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from memcache_jax import _checks
from memcache_jax._typing import Array
from memcache_jax.nn.recurrent.coefficients import Heads, Tokens
from memcache_jax.nn.recurrent.low_rank import wide
from memcache_jax.nn.token_shift import LayerInput


@dataclasses.dataclass(frozen=True)
class FixedDecay:
    """log_gamma_h = -rates[h]: one decay per head that is not learned, in place of the rule's own.

    Attributes:
      rates: one number >= 0 for each of the layer's heads.
      name: the name of a control with the axes ``"h"``.

    Raises:
      ValueError: for anything else; ``build`` also for another number of heads.
    """

    rates: tuple[float, ...]
    name: str = "log_gamma"

    def __post_init__(self) -> None:
        _checks.check_instance("rates", self.rates, tuple, "a tuple with a number for each head")
        _checks.check_instance("name", self.name, str, "the name of a control")
        rates = tuple(
            _checks.check_number("rates", rate, "finite numbers >= 0", lambda x: x >= 0)
            for rate in self.rates
        )
        _checks.set_fields(self, rates=rates)

    @property
    def names(self) -> tuple[str, ...]:
        """The one name."""
        return (self.name,)

    def build(self, in_features: int, heads: int, dim: int, **options: Any) -> "FixedOf":
        """Returns the module, which has no parameters."""
        if len(self.rates) != heads:
            raise ValueError(f"rates must be {heads} numbers, one per head, got {len(self.rates)}")
        return FixedOf(self)


class FixedOf(nnx.Module):
    """The module of a ``FixedDecay``."""

    def __init__(self, decay: FixedDecay) -> None:
        self.decay = decay

    def __call__(self, inputs: LayerInput, heads: Heads, tokens: Tokens) -> dict[str, Array]:
        """Returns the constants."""
        dtype = jnp.promote_types(inputs.x.dtype, jnp.float32)
        return {self.decay.name: -jnp.asarray(self.decay.rates, dtype)}


@dataclasses.dataclass(frozen=True)
class ForgetGate:
    """A forget gate f per key channel, and the key 1 - f, as in HGRN2 (arXiv:2404.07904).

    f = least + (1 - least) sigmoid(z), log_alpha = log f and key = 1 - f, where z is what the
    layer's key path makes. Both are taken from log sigmoid(z) and sigmoid(-z), not from f, and are
    as accurate where f is near 1 or near 0 as elsewhere.

    Attributes:
      least: the lower bound of f, in [0, 1). HGRN2 learns one for each layer and channel that
        grows with depth; this is one constant.
    """

    least: float = 0.0

    def __post_init__(self) -> None:
        good = _checks.check_number("least", self.least, "in [0, 1)", lambda x: 0 <= x < 1)
        _checks.set_fields(self, least=good)

    @property
    def names(self) -> tuple[str, ...]:
        """The decay; the key is no control."""
        return ("log_alpha",)

    def build(self, in_features: int, heads: int, dim: int, **options: Any) -> "ForgetOf":
        """Returns the module, which has no parameters."""
        return ForgetOf(self)


class ForgetOf(nnx.Module):
    """The module of a ``ForgetGate``."""

    def __init__(self, forget: ForgetGate) -> None:
        self.forget = forget

    def __call__(self, inputs: LayerInput, heads: Heads, tokens: Tokens) -> dict[str, Array]:
        """Returns the decay and the key."""
        logits, least = wide(tokens["key"]), self.forget.least
        log_f, left = jax.nn.log_sigmoid(logits), jax.nn.sigmoid(-logits)
        if least:
            # f = sigmoid(z) + least sigmoid(-z)
            log_f = jnp.logaddexp(log_f, math.log(least) + jax.nn.log_sigmoid(-logits))
        key = (1 - least) * left
        return {"log_alpha": log_f, "key": key.astype(tokens["key"].dtype)}
