"""How the batch of an update maps to the units of a sweep."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from memcache_jax._typing import Array
from memcache_jax.kernels._sweep_blocks import Inside, is_inside, mapped


class Order:
    """How a batch (b, h, *runs) maps to units: heads last, so that rows may hold them inside."""

    def __init__(self, batch: tuple[int, ...]) -> None:
        self.outer = (batch[0], *batch[2:]) if len(batch) > 1 else batch
        self.heads = batch[1] if len(batch) > 1 else 1
        self.batch = batch

    def of_units(self, x: Array) -> Array:
        """From (*batch, ...) to (units, ...); axes of the batch may be 1."""
        x, dims = self._heads_to(x, 1, len(self.batch) - 1), len(self.batch)
        return x.reshape(math.prod(x.shape[:dims]), *x.shape[dims:])

    def of_batch(self, x: Array) -> Array:
        """From (units, ...) to (*batch, ...)."""
        heads = self.batch[1:2]
        return self._heads_to(x.reshape(*self.outer, *heads, *x.shape[1:]), len(self.batch) - 1, 1)

    def packed(self, tree: Any, inside: bool) -> Any:
        """From (*batch, chunks, ...) to (units, chunks, ...), or ``Inside`` where m rows have k."""

        def of(x: Array) -> Any:
            if not inside or x.ndim != len(self.batch) + 3:
                return self.of_units(x)
            return Inside(
                jnp.moveaxis(x, 1, -2).reshape(
                    math.prod(self.outer), *x.shape[len(self.batch) : -1], self.heads, x.shape[-1]
                )
            )

        return jax.tree.map(of, tree)

    def unpacked(self, tree: Any) -> Any:
        """To (*batch, chunks, ...), from what ``packed`` returns."""

        def of(x: Any) -> Array:
            if not is_inside(x):
                return self.of_batch(x)
            return jnp.moveaxis(x.heads.reshape(*self.outer, *x.heads.shape[1:]), -2, 1)

        return mapped(of, tree)

    def _heads_to(self, x: Array, source: int, destination: int) -> Array:
        return x if len(self.batch) < 3 else jnp.moveaxis(x, source, destination)
