"""Loops whose carry XLA does not copy.

An axis of size one may have any place in a layout. XLA for CPUs may choose different places in
successive operations, and then copies the array between equivalent layouts. So loops, and programs
that run for each token, take arrays without such axes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from memcache_jax._typing import Array, Bool
from memcache_jax.sharding.layout import explicit_axes

T = TypeVar("T")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slim(Generic[T]):
    """A pytree stored without the axes of size one of its arrays.

    Arrays in host memory keep them, and so do all arrays on a mesh with Explicit axes.

    Attributes:
      arrays: the leaves.
      structure: of the pytree.
      ones: the axes of size one that each leaf had.
    """

    arrays: list
    structure: Any = dataclasses.field(metadata=dict(static=True))
    ones: tuple[tuple[int, ...], ...] = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def of(cls, tree: T) -> "Slim[T]":
        """The pytree without these axes."""
        leaves, structure = jax.tree.flatten(tree)
        leaves = [jnp.asarray(x) for x in leaves]
        ones = tuple(map(_ones, leaves))
        slim = [lax.squeeze(x, axes) for x, axes in zip(leaves, ones, strict=True)]
        return cls(slim, structure, ones)

    def full(self) -> T:
        """The pytree."""
        pairs = zip(self.arrays, self.ones, strict=True)
        leaves = [lax.expand_dims(x, axes) for x, axes in pairs]
        return jax.tree.unflatten(self.structure, leaves)


def while_loop(condition: Callable[[T], Array], body: Callable[[T], T], first: T) -> T:
    """As ``lax.while_loop``."""
    last = lax.while_loop(
        lambda carry: condition(carry.full()),
        lambda carry: Slim.of(body(carry.full())),
        Slim.of(first),
    )
    return last.full()


def fori_loop(times: int, body: Callable[[T], T], first: T) -> T:
    """As ``lax.fori_loop`` from 0, of a body without the loop index."""
    begin = jnp.int32(0), first
    return while_loop(lambda c: c[0] < times, lambda c: (c[0] + 1, body(c[1])), begin)[1]


def once_if(condition: Bool[Array, ""], change: Callable[[T, Any], T], first: T, args: Any) -> T:
    """``change(first, args)`` if the condition holds, else ``first``.

    A loop of at most one iteration, since ``lax.cond`` would copy what it passes on unchanged.
    """

    def changed(carry: tuple[Array, T]) -> tuple[Array, T]:
        # The barrier keeps XLA from hoisting the loop-invariant work.
        left, its = lax.optimization_barrier((carry[0], args))
        return jnp.zeros_like(left), change(carry[1], its)

    return while_loop(lambda carry: carry[0], changed, (condition, first))[1]


def _ones(x: Array) -> tuple[int, ...]:
    mesh, space = jax.sharding.get_abstract_mesh(), jax.typeof(x).memory_space
    if space != jax.memory.Space.Device or (not mesh.empty and explicit_axes(mesh)):
        return ()
    return tuple(axis for axis, size in enumerate(x.shape) if size == 1)
