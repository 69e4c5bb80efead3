"""Mapping a computation over independent units (rows of a batch, heads, segments)."""

import math
from collections.abc import Callable

import jax
from jax import lax

_IN_CACHE = 2**18  # bytes that units may have together, to be taken at once by a CPU


def for_each_unit(unit: Callable, batch_dims: int) -> Callable:
    """Returns ``unit`` mapped over the first ``batch_dims`` axes of all its arguments.

    Accelerators run all units side by side. A CPU runs them in turn, so that what a unit works on
    stays in its cache: about twice as fast for a deep memory's chunks; small ones a few at a time,
    twice as fast as each alone. The choice is made when the program is lowered for a platform. Not
    meant to be differentiated: the residuals of both forms would be kept.
    """
    every = jax.vmap(unit)

    def in_turn(*args):
        leaves = jax.tree.leaves(args)
        units = len(leaves[0])
        size = sum(x.size * x.dtype.itemsize for x in leaves) // units
        few = max(
            n for n in range(1, units + 1) if units % n == 0 and n * size <= max(_IN_CACHE, size)
        )
        if few == 1:
            return lax.map(lambda xs: unit(*xs), args)
        groups = jax.tree.map(lambda x: x.reshape(units // few, few, *x.shape[1:]), args)
        done = lax.map(lambda xs: every(*xs), groups)
        return jax.tree.map(lambda x: x.reshape(units, *x.shape[2:]), done)

    def flattened(mapped: Callable) -> Callable:
        # One batch axis: the simplifier of jaxlib 0.10 fails on products with three permuted ones.
        def call(*args):
            batch = jax.tree.leaves(args)[0].shape[:batch_dims]
            flat = jax.tree.map(lambda x: x.reshape(math.prod(batch), *x.shape[batch_dims:]), args)
            return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), mapped(*flat))

        return call

    side_by_side, in_turn = flattened(every), flattened(in_turn)
    return lambda *args: lax.platform_dependent(*args, cpu=in_turn, default=side_by_side)
