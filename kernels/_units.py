"""Mapping a computation over independent units (rows of a batch, heads, segments)."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name

WRITTEN = "memcache_written"
"""The name of what a write gives and what its backward pass needs, for ``jax.checkpoint_policies``.

With it a policy can keep all that memories have written, so that none is written anew.
"""


def written(tree: Any) -> Any:
    """The tree, its arrays named ``WRITTEN``."""

    # As one row: libtpu crashes on copies to the host of what it has laid out in another order.
    def named(x: jax.Array) -> jax.Array:
        return checkpoint_name(x.reshape(-1), WRITTEN).reshape(x.shape)

    return jax.tree.map(named, tree)


def for_each_unit(unit: Callable, batch_dims: int) -> Callable:
    """Returns ``unit`` mapped over the first ``batch_dims`` axes of all its arguments.

    Accelerators run all units side by side. A CPU runs them in turn, so that what a unit works on
    stays in its cache: about twice as fast for a deep memory's chunks. The choice is made when the
    program is lowered for a platform. Not meant to be differentiated: the residuals of both forms
    would be kept.
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
    return lambda *args: lax.platform_dependent(*args, cpu=in_turn, default=side_by_side)
