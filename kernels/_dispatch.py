"""Choice among the implementations of an operation."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

AUTOMATIC: Mapping[str, Mapping[str, str]] = {}
"""By operation and platform, the implementation that was measured to beat XLA there."""


class CannotServeError(NotImplementedError):
    """An implementation cannot take these arguments."""


def choose(
    name: str, implementations: Mapping[str, Callable[..., Any]], choice: str | None
) -> Callable[..., Any]:
    """Returns the implementation of that name; for None, the best one of each platform.

    That is ``"xla"``, unless ``AUTOMATIC`` names another. A program takes its platform's when it is
    lowered: compiled ahead of time, it is the same as compiled where it runs.

    Raises:
      ValueError: for an unknown name.
    """
    if choice is not None and choice not in implementations:
        raise ValueError(
            f"{name} has the implementations {sorted(implementations)}, got {choice!r}"
        )
    by_platform = AUTOMATIC.get(name, {})
    if choice is not None or not by_platform:
        return implementations[choice or "xla"]
    platforms = {
        platform: _served_first(implementations[best], implementations["xla"])
        for platform, best in by_platform.items()
    }
    return functools.partial(_by_platform, platforms, implementations["xla"])


def check_served(name: str, implementation: str, reasons: Sequence[tuple[bool, str]]) -> None:
    """Raises CannotServeError with every reason that holds, if any does."""
    found = [reason for holds, reason in reasons if holds]
    if found:
        raise CannotServeError(f"{name} by {implementation!r} cannot serve: {'; '.join(found)}")


def _served_first(fast: Callable[..., Any], fallback: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args):
        try:
            return fast(*args)
        except CannotServeError:
            return fallback(*args)

    return call


def _by_platform(platforms: Mapping[str, Callable], default: Callable, *args: Any) -> Any:
    """Calls what is lowered for a platform with its function.

    Backward passes choose anew and keep only the arguments: differentiating the choice itself would
    keep what each of the functions keeps.
    """
    leaves, tree = jax.tree.flatten(args)
    traced = [isinstance(leaf, jax.Array) for leaf in leaves]
    inexact = [
        jnp.issubdtype(x.dtype, jnp.inexact) if isinstance(x, jax.Array) else False for x in leaves
    ]

    def parts(mask: Sequence[bool]) -> list:
        return [leaf for leaf, taken in zip(leaves, mask, strict=True) if taken]

    def filled(floats: Sequence, others: Sequence) -> Any:
        of_floats, of_others = iter(floats), iter(others)
        chosen = (
            next(of_floats) if is_float else next(of_others) if array else leaf
            for leaf, array, is_float in zip(leaves, traced, inexact, strict=True)
        )
        return jax.tree.unflatten(tree, chosen)

    def choice(wrap: Callable[[Callable], Callable], *operands: Any) -> Any:
        functions = {platform: wrap(function) for platform, function in platforms.items()}
        return lax.platform_dependent(*operands, **functions, default=wrap(default))

    @jax.custom_vjp
    def call(floats, others):
        return choice(lambda function: lambda f, o: function(*filled(f, o)), floats, others)

    def forward(floats, others):
        return call(floats, others), (floats, others)

    def backward(residuals, cotangent):
        def pullback(function: Callable) -> Callable:
            def pull(floats, others, cotangent):
                return jax.vjp(lambda f: function(*filled(f, others)), floats)[1](cotangent)[0]

            return pull

        return choice(pullback, *residuals, cotangent), None

    call.defvjp(forward, backward)
    others = [array and not is_float for array, is_float in zip(traced, inexact, strict=True)]
    return call(parts(inexact), parts(others))
