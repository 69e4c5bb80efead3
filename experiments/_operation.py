"""The operation of a layer with memory caching, without its projections, convolutions and norms."""

from collections.abc import Callable
from typing import Any


def operation(layer: Any, x: Any) -> tuple[Callable, tuple]:
    """Returns the gradient of ``mc.memory_caching`` on a layer's own arrays, and its arguments.

    Args:
      layer: a layer with memory caching.
      x: the layer's input.
    """
    import jax
    import jax.numpy as jnp

    import memcache_jax as mc

    names = ("memory", "aggregation", "segmentation", "start")
    how: dict[str, Any] = {name: getattr(layer, name) for name in names}

    def loss(arrays: dict[str, Any]) -> jax.Array:
        return jnp.sum(mc.memory_caching(**arrays, **how) ** 2)

    return jax.grad(loss), (layer.operands(x),)
