"""The protocol of caches: reset rows, take rows, and share arrays among stacked layers."""

import dataclasses
import inspect
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
    """Base class for the cache of one layer: a frozen dataclass whose fields are declared by kind.

    A language model scans over the stacked caches of equal layers. A scan copies what it stacks,
    so only small arrays are stacked. Large ones are shared: the layers have one array for the rows
    of all, in which a layer's own begin at ``first``.

    Register subclasses with ``jax.tree_util.register_dataclass``. With shared arrays a subclass
    needs a field ``first`` that defaults to None; read such arrays through ``own_rows`` and update
    them through ``put_rows``.

    Attributes:
      small: fields of arrays (b, ...), or trees of them, of which each layer has its own.
      shared: fields of large arrays (b, ...), in a stack (layers * b, ...).
      common: fields of arrays without a row axis.
      nested: fields that are caches themselves.
      zeroed: small fields that are zero before a row's first token, as all shared arrays are.

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

    def __init_subclass__(cls) -> None:
        kinds = {"small", "shared", "common", "nested"}
        declared = {"zeroed", "first", *kinds}.union(*(getattr(cls, kind) for kind in kinds))
        for name in inspect.get_annotations(cls):
            metadata = getattr(cls.__dict__.get(name), "metadata", {})
            if name not in declared and not metadata.get("static"):
                raise TypeError(f"{cls.__name__}.{name} must be in one of {sorted(kinds)}")

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return count_bytes(self)

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        if self.nested:
            return getattr(self, self.nested[0]).batch_size
        return len(jax.tree.leaves(self._fields(self.small))[0])

    def reset(self: C, rows: jax.typing.ArrayLike) -> C:
        """Returns the cache with the marked rows (b,) empty again.

        It shares unchanged arrays with this cache: donating one invalidates the other.
        """
        rows = jnp.asarray(rows)
        cache = self.reset_small(rows)
        without = all(x is None for x in self.states)
        return cache if without else cache.with_states(self.reset_states(rows))

    def take(self: C, rows: jax.typing.ArrayLike) -> C:
        """Returns the cache of these rows, in this order; a row may be taken more than once.

        It shares no array with this cache, so either can be donated.
        """
        rows = _checks.check_rows(rows, self.batch_size)
        return self.take_small(rows).with_states(self.take_states(rows))

    def arrays(self) -> list[tuple[str, Any]]:
        """Returns the name and the arrays of every declared field, nested caches included."""
        arrays = list(self._fields(self.common + self.small + self.shared).items())
        for cache in self._fields(self.nested).values():
            arrays += cache.arrays()
        return arrays

    def replace(self: C, **changes: Any) -> C:
        """Returns the cache with these fields replaced."""
        this: Any = self
        return dataclasses.replace(this, **changes)

    # For a stack of layers.

    @property
    def states(self) -> tuple:
        """The shared arrays: this cache's, then those of nested caches."""
        return self._own + self._of_nested(lambda cache: cache.states)

    def with_states(self: C, states: tuple, first: Any = None) -> C:
        """Returns the cache with these shared arrays, in which its own rows begin at ``first``."""
        rest = iter(states)
        changes: dict[str, Any] = {name: next(rest) for name in self.shared}
        if self.shared:
            changes["first"] = first
        for name, cache in self._fields(self.nested).items():
            part = tuple(itertools.islice(rest, len(cache.states)))
            changes[name] = cache.with_states(part, first)
        return self.replace(**changes)

    def own_rows(self, shared: Array) -> Array:
        """Returns this layer's rows of a shared array."""
        first = getattr(self, "first", None)
        if first is None:
            return shared
        return lax.dynamic_slice_in_dim(shared, first, self.batch_size)

    def put_rows(self, shared: Array, rows: Array) -> Array:
        """Returns a shared array with this layer's rows replaced."""
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
        """Returns the shared arrays with the marked rows zeroed: 0 * NaN is NaN in a read."""
        own = zero_rows(self._own, rows)
        return own + self._of_nested(lambda cache: cache.reset_states(rows))

    def take_states(self, rows: Array) -> tuple:
        """Returns these rows of the shared arrays, counted over all layers."""
        own = take_rows(self._own, rows)
        return own + self._of_nested(lambda cache: cache.take_states(rows))

    def reset_small(self: C, rows: Array) -> C:
        """Returns the cache with the marked rows of its ``zeroed`` fields zeroed."""
        changes = zero_rows(self._fields(self.zeroed), rows)
        for name, cache in self._fields(self.nested).items():
            changes[name] = cache.reset_small(rows)
        return self.replace(**changes)

    def take_small(self: C, rows: Array) -> C:
        """Returns the cache with these rows of small arrays, and copies of common ones."""
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
      layers: number of layers.
    """

    small: Any
    states: tuple
    layers: int

    @property
    def layer(self) -> Any:
        """The first layer's cache, with the shared arrays of all layers."""
        return jax.tree.map(lambda x: x[0], self.small).with_states(self.states)

    def reset(self, rows: Array) -> "Stack":
        """Returns the stack with the marked rows (b,) of each layer empty again."""
        small = jax.vmap(lambda cache: cache.reset(rows))(self.small)
        return self._replace(
            small=small, states=self.layer.reset_states(jnp.tile(rows, self.layers))
        )

    def take(self, rows: Array, batch_size: int) -> "Stack":
        """Returns the stack of these rows of each layer, which has ``batch_size`` rows."""
        small = jax.vmap(lambda cache: cache.take_small(rows))(self.small)
        every = jnp.arange(self.layers)[:, None] * batch_size + rows[None]
        return self._replace(small=small, states=self.layer.take_states(every.reshape(-1)))


def without_states(cache: Any) -> Any:
    """Returns a layer's cache without its shared arrays, ready to be stacked."""
    return cache.with_states((None,) * len(cache.states))


def zero_rows(tree: Any, rows: Array) -> Any:
    """Returns arrays (b, ...) with zeros in the marked rows (b,)."""
    return jax.tree.map(
        lambda x: jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), jnp.zeros((), x.dtype), x), tree
    )


def take_rows(tree: Any, rows: Array) -> Any:
    """Returns these rows of arrays (b, ...)."""
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=0), tree)


def count_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays or ``jax.ShapeDtypeStruct``s of a tree."""
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
