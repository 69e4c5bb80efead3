"""Counts the FLOPs of the matrix products in a traced JAX program."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core


def count_flops(function: Callable, *arguments: Any) -> int:
    """Returns 2 x the multiply-adds of all matrix products that ``function`` runs.

    A loop's body counts once per trip, or once if the trip count is unknown, and of several
    branches the most expensive one counts. Elementwise work, reductions and gathers do not count.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        inner = [_count(sub) for sub in _sub_jaxprs(equation.params)]
        match equation.primitive.name:
            case "dot_general":
                (lhs_contracted, _), _ = equation.params["dimension_numbers"]
                lhs = _shape(equation.invars[0])
                contracted = math.prod(lhs[axis] for axis in lhs_contracted)
                total += 2 * contracted * math.prod(_shape(equation.outvars[0]))
            case "conv_general_dilated":
                raise NotImplementedError("convolutions are not counted")
            case "scan":
                total += equation.params["length"] * sum(inner)
            case "cond":
                total += max(inner)
            case _:
                total += sum(inner)
    return total


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _sub_jaxprs(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
