"""Sampling of tokens from logits."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from memcache_jax._checks import check_integer, check_key, check_number, set_fields
from memcache_jax._typing import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to draw the next token.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: samples from this many most likely tokens; None for all.
      top_p: samples from the smallest set of most likely tokens whose probabilities sum to at
        least this, in (0, 1]; applied after ``top_k``.

    Raises:
      ValueError: if a number is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        wanted = "a finite number >= 0"
        set_fields(
            self,
            temperature=float(
                check_number("temperature", self.temperature, wanted, lambda x: x >= 0)
            ),
            top_k=check_integer("top_k", self.top_k, optional=True),
            top_p=check_number("top_p", self.top_p, "in (0, 1]", lambda x: 0 < x <= 1),
        )

    def check_key(self, key: Array | None) -> Array:
        """Returns the key, or raises ValueError if one is needed and missing."""
        if key is None and self.temperature > 0:
            raise ValueError(
                f"sampling at temperature {self.temperature} needs key=jax.random.key(...); "
                "temperature=0 takes the most likely token and needs none"
            )
        if key is None:
            return jax.random.key(0)
        return check_key(key)

    @property
    def static(self) -> dict[str, Any]:
        """The static arguments of ``sample``."""
        return dict(greedy=self.temperature == 0, top_k=self.top_k, nucleus=self.top_p < 1)

    @property
    def numbers(self) -> tuple[float, float]:
        """The traced arguments of ``sample``."""
        return self.temperature, self.top_p


def sample(
    key: Array,
    logits: Float[Array, "b vocab"],
    numbers: tuple[Any, Any],
    *,
    greedy: bool,
    top_k: int | None,
    nucleus: bool,
) -> Int[Array, "b"]:
    """Draws one token per row, from logits in float32 or wider.

    The arguments after them are ``Sampling.numbers`` and ``Sampling.static``.
    """
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = scaled(logits, numbers[0])
    if _takes_all(logits, top_k, nucleus):
        return jax.random.categorical(key, logits).astype(jnp.int32)
    ordered, order = _likely(logits, numbers, top_k, nucleus)
    rank = jax.random.categorical(key, ordered)
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)


def probabilities(
    logits: Float[Array, "... vocab"],
    numbers: tuple[Any, Any],
    *,
    greedy: bool,
    top_k: int | None,
    nucleus: bool,
) -> Float[Array, "... vocab"]:
    """The probabilities that ``sample`` draws each token with."""
    if greedy:
        return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=logits.dtype)
    logits = scaled(logits, numbers[0])
    if _takes_all(logits, top_k, nucleus):
        return jax.nn.softmax(logits, axis=-1)
    ordered, order = _likely(logits, numbers, top_k, nucleus)
    none, chances = jnp.zeros_like(logits), jax.nn.softmax(ordered, axis=-1)
    return jnp.put_along_axis(none, order, chances, axis=-1, inplace=False)


def scaled(logits: Float[Array, "... vocab"], temperature: Any) -> Float[Array, "... vocab"]:
    """The logits divided by the temperature."""
    # Shift the largest logit to 0: then a tiny temperature overflows to -inf, never to NaN.
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    return logits / jnp.maximum(temperature, jnp.finfo(logits.dtype).tiny)


def _takes_all(logits: Float[Array, "... vocab"], top_k: int | None, nucleus: bool) -> bool:
    return not nucleus and (top_k is None or top_k >= logits.shape[-1])


def _likely(
    logits: Float[Array, "... vocab"], numbers: tuple[Any, Any], top_k: int | None, nucleus: bool
) -> tuple[Float[Array, "... n"], Int[Array, "... n"]]:
    """The logits of the tokens that may be drawn, the largest first, -inf of others; their ids."""
    most = logits.shape[-1] if top_k is None else min(top_k, logits.shape[-1])
    ordered, order = lax.top_k(logits, most)
    return within_nucleus(ordered, numbers[1]) if nucleus else ordered, order


def within_nucleus(ordered: Float[Array, "... n"], top_p: Any) -> Float[Array, "... n"]:
    """Logits, the largest first, with -inf beyond the fewest that have ``top_p`` together."""
    probability = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # Keep the most likely token regardless of rounding.
    kept = (before < top_p).at[..., 0].set(True)
    return jnp.where(kept, ordered, -jnp.inf)
