"""Compiles eager calls (outside jit, grad and vmap) once per configuration and shape.

JAX compiles a loop again whenever its body is a new function, as ours are at each call: an eager
call would take a second each time.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np

from memcache_jax.kernels._dispatch import interpreted, is_traced

_ARRAYS = (jax.Array, np.ndarray, np.generic, bool, int, float)


def compiled(function: Callable[..., Any], *arrays: Any, **how: Hashable) -> Any:
    """Returns ``function(*arrays, **how)``: compiled, unless it is being traced.

    Args:
      function: a module-level function, the same object at every call.
      arrays: trees of arrays. With anything else in them the function runs uncompiled.
      how: static options. If one does not compare by value (``is_value``), the function runs
        uncompiled.
    """
    leaves = jax.tree.leaves(arrays)
    if is_traced(*leaves) or not all(isinstance(x, _ARRAYS) for x in leaves):
        return function(*arrays, **how)
    if not all(map(is_value, how.values())):
        return function(*arrays, **how)
    try:
        hash(tuple(how.values()))
    except TypeError:
        return function(*arrays, **how)
    return _program(function, tuple(how.items()), interpreted(), *arrays)


def is_value(x: Any) -> bool:
    """Whether ``x`` and its fields compare by value, as frozen dataclasses do.

    An object that equals only itself may change between calls. Functions count as values.
    """
    if isinstance(x, (tuple, frozenset)):
        return all(map(is_value, x))
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        parts = (getattr(x, field.name) for field in dataclasses.fields(x) if field.compare)
        if not all(map(is_value, parts)):
            return False
    return x is None or callable(x) or type(x).__hash__ is not object.__hash__


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _program(
    function: Callable[..., Any], how: tuple[tuple[str, Hashable], ...], _: bool, *arrays: Any
) -> Any:
    return function(*arrays, **dict(how))
