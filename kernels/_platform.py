"""Refuses programs with kernels of another platform than they are compiled for.

That is known when a program is lowered, and not before: one that is compiled ahead of time need not
be for the devices of this machine.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from memcache_jax.kernels._dispatch import interpreted, is_traced

_PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}


def check_platform(implementation: str | None, array: Any) -> None:
    """Raises NotImplementedError if what an array is on has not the kernels that are asked for.

    Within a transformation nothing is known: there it is ``only_on_its_platform`` that refuses.
    """
    if implementation not in _PLATFORMS or interpreted():
        return
    if is_traced(array):
        return
    here = jax.default_backend()
    if isinstance(array, jax.Array):
        here = next(iter(array.sharding.device_set)).platform
    if here != _PLATFORMS[implementation]:
        _refuse(implementation, here)


def only_on_its_platform(implementation: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``call``, with an error where a program is lowered for another platform.

    Args:
      implementation: ``"pallas_tpu"`` or ``"pallas_gpu"``.
      call: as from ``pl.pallas_call``.

    Raises:
      NotImplementedError: from what is returned, and under ``jit`` when the program is lowered.
    """
    if interpreted():
        return call

    def checked(*args: Any) -> Any:
        (first, *rest), tree = jax.tree.flatten(args)
        first = _CHECKS[implementation].bind(first)
        return call(*jax.tree.unflatten(tree, [first, *rest]))

    return checked


def _check(implementation: str) -> Primitive:
    """The identity on the platform of an implementation, and an error on others."""
    check = Primitive(f"only_on_{_PLATFORMS[implementation]}")
    check.def_impl(jax.jit(check.bind))
    check.def_abstract_eval(lambda x: x)
    batching.defvectorized(check)

    def refuse(context: mlir.LoweringRuleContext, _: Any) -> Any:
        _refuse(implementation, " and ".join(context.module_context.platforms))

    mlir.register_lowering(check, refuse)
    mlir.register_lowering(check, lambda _, x: [x], platform=_PLATFORMS[implementation])
    return check


def _refuse(implementation: str, here: str) -> None:
    raise NotImplementedError(
        f"the kernels of implementation={implementation!r} are for {_PLATFORMS[implementation]}, "
        f"and this program is compiled for {here}: implementation='xla' runs on any platform"
    )


_CHECKS = {implementation: _check(implementation) for implementation in _PLATFORMS}
