"""How operations run: by which implementation, over which units, compiled or interpreted."""

import contextlib
import contextvars
import functools
import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer

AUTOMATIC: Mapping[str, Mapping[str, str]] = {}
"""By operation and platform, the implementation that was measured to beat XLA there."""

WRITTEN = "memcache_written"
"""Names what a write returns and what its backward pass needs, for ``jax.checkpoint_policies``.

A policy that saves this name saves everything that memories have written, so that the backward pass
writes nothing a second time.
"""

ROUTED = "memcache_routed"
"""Names what a kernel keeps of SSC's routing: the gates, and the states that tokens read."""

_INTERPRETED = contextvars.ContextVar("kernels_interpreted", default=False)


class CannotServeError(NotImplementedError):
    """An implementation cannot take these arguments, or is missing."""


def implementations(operation: str, *names: str) -> dict[str, Callable[..., Any]]:
    """Returns the implementations of an operation by name; each is imported when first called.

    ``"pallas_tpu"`` of ``"bank_read"`` is the function ``bank_read`` of
    ``memcache_jax/kernels/bank_read/tpu.py``. Calling one whose import fails, for example because
    JAX no longer ships its backend, raises CannotServeError with the reason.
    """

    def deferred(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            file = name.removeprefix("pallas_")
            try:
                module = importlib.import_module(f"memcache_jax.kernels.{operation}.{file}")
            except ImportError as error:
                raise CannotServeError(f"{operation} by {name!r} is missing: {error}") from error
            return getattr(module, operation)(*args)

        return call

    return {name: deferred(name) for name in names}


def choose(
    name: str, implementations: Mapping[str, Callable[..., Any]], choice: str | None
) -> Callable[..., Any]:
    """Returns the implementation of that name; for None, the fastest one for each platform.

    The fastest is ``"xla"``, unless ``AUTOMATIC`` names another. The platform is the one that the
    program is lowered for, so that compiling ahead of time makes the same choice.

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
        platform: _with_fallback(implementations[best], implementations["xla"])
        for platform, best in by_platform.items()
    }
    return functools.partial(_by_platform, platforms, implementations["xla"])


def check_served(name: str, implementation: str, reasons: Sequence[tuple[bool, str]]) -> None:
    """Raises CannotServeError with every reason whose condition holds, if any does."""
    found = [reason for holds, reason in reasons if holds]
    if found:
        raise CannotServeError(f"{name} by {implementation!r} cannot serve: {'; '.join(found)}")


def for_each_unit(unit: Callable, batch_dims: int) -> Callable:
    """Returns ``unit`` mapped over the first ``batch_dims`` axes of all its arguments.

    Units are rows of a batch, heads or segments. Accelerators run them side by side. A CPU runs
    them in turn, so that what a unit works on stays in its cache: about twice as fast for a deep
    memory's chunks. The platform is the one that the program is lowered for. Do not differentiate
    the result, which would keep the residuals of both forms.
    """

    def flattened(mapped: Callable) -> Callable:
        # One batch axis: the simplifier of jaxlib 0.10 fails on products with three permuted ones.
        def call(*args):
            batch = jax.tree.leaves(args)[0].shape[:batch_dims]
            flat = jax.tree.map(lambda x: x.reshape(math.prod(batch), *x.shape[batch_dims:]), args)
            return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), mapped(*flat))

        return call

    side_by_side = flattened(jax.vmap(unit))
    in_turn = flattened(lambda *args: lax.map(lambda xs: unit(*xs), args))

    def call(*args):
        # Of units that it divides over devices, the compiler would gather those that run in turn.
        if compiler_divides(args):
            return side_by_side(*args)
        return lax.platform_dependent(*args, cpu=in_turn, default=side_by_side)

    return call


def compiler_divides(args: Any) -> bool:
    """Whether the compiler may divide these arrays over several devices."""
    meshes = [jax.sharding.get_abstract_mesh()]
    meshes += [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(args)]
    auto = jax.sharding.AxisType.Auto
    return any(not m.empty and m.size > 1 and auto in m.axis_types for m in meshes)


def written(tree: Any) -> Any:
    """Returns the tree with its arrays named ``WRITTEN``."""
    return _named(tree, WRITTEN)


def routed(tree: Any) -> Any:
    """Returns the tree with its arrays named ``ROUTED``."""
    return _named(tree, ROUTED)


def _named(tree: Any, name: str) -> Any:

    # As one row: libtpu crashes on copies to the host of what it has laid out in another order.
    def named(x: jax.Array) -> jax.Array:
        return checkpoint_name(x.reshape(-1), name).reshape(x.shape)

    return jax.tree.map(named, tree)


@contextlib.contextmanager
def interpret_kernels() -> Iterator[None]:
    """Traces Triton and TPU kernels so that they run on a CPU, for tests of their numbers.

    With ``pltpu.force_tpu_interpret_mode`` too, TPU kernels run on a simulation of a TPU's
    memories, which takes much longer.
    """
    token = _INTERPRETED.set(True)
    try:
        yield
    finally:
        _INTERPRETED.reset(token)


def is_traced(*arrays: Any) -> bool:
    """Whether a transformation is at work, or an array is one's tracer."""
    return any(isinstance(x, Tracer) for x in arrays) or isinstance(jnp.zeros(()), Tracer)


def interpreted() -> bool:
    """Whether kernels are traced by ``interpret_kernels``."""
    return _INTERPRETED.get()


def _with_fallback(fast: Callable[..., Any], fallback: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args):
        try:
            return fast(*args)
        except CannotServeError:
            return fallback(*args)

    return call


def _by_platform(platforms: Mapping[str, Callable], default: Callable, *args: Any) -> Any:
    """Calls the function of the platform that the program is lowered for.

    The backward pass makes the choice again and keeps only the arguments: differentiating the
    choice itself would keep the residuals of every function.
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
