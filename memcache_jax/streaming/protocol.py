"""What every cache can do, from a few declarations: reset rows, take rows, share arrays."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from memcache_jax import _checks
from memcache_jax._typing import Array

C = TypeVar("C", bound="MixerCache")


class MixerCache:
    """The cache of one layer, as a frozen dataclass whose class variables say what its fields are.

    A language model stacks the caches of equal layers and scans over the stack. Small arrays are
    stacked along a first axis and copied from step to step. Large ones would be copied with them,
    so the layers share one array of all their rows, and ``first`` is where a layer's rows begin.

    Subclasses are registered with ``jax.tree_util.register_dataclass``. Those with shared arrays
    have a field ``first``, None by default, and ``extend`` reads them through ``own_rows`` and
    writes them through ``put_rows``.

    Attributes:
      small: fields of arrays (b, ...), or trees of them, that each layer has for itself.
      shared: fields of large arrays (b, ...), or in a stack (layers * b, ...).
      common: fields of arrays without a row axis.
      nested: fields that are caches themselves.
      zeroed: the small fields that are zero before a row's first token; shared arrays all are.

    Example:
      >>> import dataclasses, jax, jax.numpy as jnp, memcache_jax as mc
      >>> from typing import Any
      >>> @jax.tree_util.register_dataclass
      ... @dataclasses.dataclass(frozen=True)
      ... class LastTokens(mc.nn.MixerCache):
      ...     tokens: Any
      ...     position: Any
      ...     small = zeroed = ("tokens", "position")
      >>> cache = LastTokens(jnp.ones((3, 4, 8)), jnp.array([5, 6, 7]))
      >>> cache.reset(jnp.array([False, True, False])).take(jnp.array([2, 1])).position.tolist()
      [7, 0]
    """

    small: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[tuple[str, ...]] = ()
    common: ClassVar[tuple[str, ...]] = ()
    nested: ClassVar[tuple[str, ...]] = ()
    zeroed: ClassVar[tuple[str, ...]] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return count_bytes(self)

    @property
    def batch_size(self) -> int:
        """Rows."""
        if self.nested:
            return getattr(self, self.nested[0]).batch_size
        return len(jax.tree.leaves(self._fields(self.small))[0])

    def reset(self: C, rows: jax.typing.ArrayLike) -> C:
        """The cache with the marked rows (b,) before their first token.

        It shares what it does not change with this one: donate either, and the other is gone.
        """
        rows = jnp.asarray(rows)
        cache = self.reset_small(rows)
        without = all(x is None for x in self.states)
        return cache if without else cache.with_states(self.reset_states(rows))

    def take(self: C, rows: jax.typing.ArrayLike) -> C:
        """The cache of these rows, in this order; a row may be taken more than once.

        No array is shared with this one, so that either may be donated.
        """
        rows = _checks.check_rows(rows, self.batch_size)
        return self.take_small(rows).with_states(self.take_states(rows))

    def arrays(self) -> dict[str, Any]:
        """The arrays of each declared field, those of nested caches included, by their names."""
        arrays = self._fields(self.common + self.small + self.shared)
        for cache in self._fields(self.nested).values():
            arrays |= cache.arrays()
        return arrays

    def replace(self: C, **changes: Any) -> C:
        """The cache with other values in some fields."""
        this: Any = self
        return dataclasses.replace(this, **changes)

    # What a stack of layers needs.

    @property
    def states(self) -> tuple:
        """The shared arrays, own ones first."""
        return self._own + self._of_nested(lambda cache: cache.states)

    def with_states(self: C, states: tuple, first: Any = None) -> C:
        """The cache with these shared arrays, of which its own rows begin at ``first``."""
        rest = iter(states)
        changes: dict[str, Any] = {name: next(rest) for name in self.shared}
        if self.shared:
            changes["first"] = first
        for name, cache in self._fields(self.nested).items():
            part = tuple(itertools.islice(rest, len(cache.states)))
            changes[name] = cache.with_states(part, first)
        return self.replace(**changes)

    def own_rows(self, shared: Array) -> Array:
        """This layer's rows of a shared array."""
        first = getattr(self, "first", None)
        if first is None:
            return shared
        return lax.dynamic_slice_in_dim(shared, first, self.batch_size)

    def put_rows(self, shared: Array, rows: Array) -> Array:
        """A shared array with this layer's rows replaced."""
        first = getattr(self, "first", None)
        first = 0 if first is None else first
        return lax.dynamic_update_slice_in_dim(shared, rows.astype(shared.dtype), first, axis=0)

    def empty_states(self, rows: int) -> tuple:
        """Allocates ``rows`` rows of empty shared arrays."""

        def empty(x: Array) -> Array:
            return jnp.zeros((rows, *x.shape[1:]), x.dtype)

        own = jax.tree.map(empty, self._own)
        return own + self._of_nested(lambda cache: cache.empty_states(rows))

    def reset_states(self, rows: Array) -> tuple:
        """The shared arrays with the marked rows zeroed: a weight of 0 does not remove a NaN."""
        own = zero_rows(self._own, rows)
        return own + self._of_nested(lambda cache: cache.reset_states(rows))

    def take_states(self, rows: Array) -> tuple:
        """These rows of the shared arrays, counted over all layers."""
        own = take_rows(self._own, rows)
        return own + self._of_nested(lambda cache: cache.take_states(rows))

    def reset_small(self: C, rows: Array) -> C:
        """The cache with the marked rows of ``zeroed`` fields zeroed."""
        changes = zero_rows(self._fields(self.zeroed), rows)
        for name, cache in self._fields(self.nested).items():
            changes[name] = cache.reset_small(rows)
        return self.replace(**changes)

    def take_small(self: C, rows: Array) -> C:
        """The cache with these rows of its small arrays, and copies of its common ones."""
        changes = take_rows(self._fields(self.small), rows)
        changes |= jax.tree.map(jnp.copy, self._fields(self.common))
        for name, cache in self._fields(self.nested).items():
            changes[name] = cache.take_small(rows)
        return self.replace(**changes)

    def _fields(self, names: tuple[str, ...]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}

    @property
    def _own(self) -> tuple:
        return tuple(getattr(self, name) for name in self.shared)

    def _of_nested(self, states_of: Callable[[Any], tuple]) -> tuple:
        caches = self._fields(self.nested).values()
        return tuple(itertools.chain.from_iterable(map(states_of, caches)))


class Stack(NamedTuple):
    """The caches of equal layers, of any class with the methods of ``MixerCache``.

    Attributes:
      small: a layer's cache without its shared arrays; each array has a first axis of layers.
      states: the arrays that the layers share, (layers * b, ...).
      layers: how many they are.
    """

    small: Any
    states: tuple
    layers: int

    @property
    def layer(self) -> Any:
        """The first layer's cache, with the shared arrays of all layers."""
        return jax.tree.map(lambda x: x[0], self.small).with_states(self.states)

    def reset(self, rows: Array) -> "Stack":
        """The stack with the marked rows (b,) of each layer before their first token."""
        small = jax.vmap(lambda cache: cache.reset(rows))(self.small)
        return self._replace(
            small=small, states=self.layer.reset_states(jnp.tile(rows, self.layers))
        )

    def take(self, rows: Array, batch_size: int) -> "Stack":
        """The stack of these rows of each layer, out of ``batch_size``."""
        small = jax.vmap(lambda cache: cache.take_small(rows))(self.small)
        every = jnp.arange(self.layers)[:, None] * batch_size + rows[None]
        return self._replace(small=small, states=self.layer.take_states(every.reshape(-1)))


def without_states(cache: Any) -> Any:
    """A layer's cache without its shared arrays, as it is stacked."""
    return cache.with_states((None,) * len(cache.states))


def zero_rows(tree: Any, rows: Array) -> Any:
    """Arrays (b, ...) with zeros in the marked rows (b,)."""
    return jax.tree.map(
        lambda x: jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), jnp.zeros((), x.dtype), x), tree
    )


def take_rows(tree: Any, rows: Array) -> Any:
    """These rows of arrays (b, ...)."""
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=0), tree)


def count_bytes(tree: Any) -> int:
    """Bytes of all arrays, or of what ``jax.eval_shape`` says of them."""
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
