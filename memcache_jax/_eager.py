"""Calls outside of every transformation, which are compiled once for each configuration and shape.

JAX compiles a loop again whenever its body is a new function, as ours are at each call: an eager
call would take a second each time.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from memcache_jax.kernels._dispatch import interpreted


def compiled(function: Callable[..., Any], *arrays: Any, **how: Hashable) -> Any:
    """Returns ``function(*arrays, **how)``: compiled, unless it is being traced.

    Args:
      function: of a module, so that it is the same at every call.
      arrays: trees of arrays.
      how: all else. What has no hash, such as a part of a user's own, is not compiled for.
    """
    if any(isinstance(x, Tracer) for x in (jnp.zeros(()), *jax.tree.leaves(arrays))):
        return function(*arrays, **how)
    try:
        hash(tuple(how.values()))
    except TypeError:
        return function(*arrays, **how)
    return _program(function, tuple(how.items()), interpreted(), *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _program(
    function: Callable[..., Any], how: tuple[tuple[str, Hashable], ...], _: bool, *arrays: Any
) -> Any:
    return function(*arrays, **dict(how))
