"""The protocol of caches: reset rows, take rows, and share arrays among stacked layers."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from memcache_jax import _checks
from memcache_jax._typing import Array, Bool, Int
from memcache_jax.sharding.division import Division
from memcache_jax.sharding.layout import axes_of, by_compiler, context_mesh, num_devices
from memcache_jax.streaming.rewind import taken_back_from

C = TypeVar("C", bound="MixerCache")
T = TypeVar("T")


class MixerCache:
    """Base class for the cache of one layer: a frozen dataclass whose fields are declared by kind.

    A language model scans over the stacked caches of equal layers. A scan copies what it stacks,
    so only small arrays are stacked. Large ones are shared: the layers have one array for all, in
    which a layer's own is number ``first``.

    Register subclasses with ``jax.tree_util.register_dataclass``. With shared arrays a subclass
    needs a field ``first`` that defaults to None; read such arrays through ``own_rows`` and update
    them through ``put_rows``.

    Attributes:
      small: fields of arrays (b, ...), or trees of them, of which each layer has its own; at least
        one.
      shared: fields of large arrays (b, ...), in a stack (layers, b, ...).
      common: fields of arrays without a row axis.
      nested: fields that are caches themselves.
      zeroed: small fields that are zero before a row's first token, as all shared arrays are.
      axes: by field, the letters of its first axes, ``b`` rows and ``h`` heads, for those that a
        mesh may divide; ``"b"`` by default for all but common fields.

    A cache that goes back by tokens has a field or property ``rewindable``, by how many each row
    can, (b,), or None if it was not made to; and a method ``rewound``, ``rewind`` without checks.
    One that ``mc.rewind_to`` takes further back has ``borders`` and ``returned``.

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
    axes: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls) -> None:
        kinds = ["common", "nested", "shared", "small"]
        declared = {"axes", "zeroed", "first", *kinds}.union(
            *(getattr(cls, kind) for kind in kinds)
        )
        for name in inspect.get_annotations(cls):
            metadata = getattr(cls.__dict__.get(name), "metadata", {})
            if name not in declared and not metadata.get("static"):
                raise TypeError(f"{cls.__name__}.{name} must be in one of {kinds}")
        if "__repr__" not in vars(cls):  # a dataclass would print every array
            cls.__repr__ = MixerCache.__repr__

    def __repr__(self) -> str:
        return short_repr(self)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return count_bytes(self)

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return len(jax.tree.leaves(self._fields(self.small))[0])

    def reset(self: C, rows: jax.typing.ArrayLike) -> C:
        """Returns the cache with the marked rows (b,) empty again.

        It shares unchanged arrays with this cache: donating one invalidates the other.

        Raises:
          ValueError: for rows that are not booleans (b,), such as their numbers.
        """
        rows = _checks.check_marks(rows, self.batch_size)
        cache = self._reset_small(rows)
        shared = jax.tree.leaves(self.states)  # none in a layer of a stack
        return cache.with_states(self.reset_states(rows)) if shared else cache

    def take(self: C, rows: jax.typing.ArrayLike) -> C:
        """Returns the cache of these rows, in this order; a row may be taken more than once.

        It shares no array with this cache, so either can be donated.

        Raises:
          ValueError: for rows that are not numbers from 0 to b - 1, where they are known. Rows that
            are traced and out of range are those of ``jnp.take``: NaN, or counted from the end.
        """
        rows = _checks.check_rows(rows, self.batch_size)
        return self.take_small(rows).with_states(self.take_states(rows))

    def rewind(self: C, tokens: jax.typing.ArrayLike) -> C:
        """Returns the cache as if the last ``tokens`` (b,) of each row had never come.

        A cache of ``init_cache(..., rewind=W)`` goes back by any W tokens of a row, or by fewer
        where it has gone back since, to what it was bit for bit. Under ``jit`` too many cannot be
        refused: outputs of such a row are NaN until it is reset.

        Raises:
          ValueError: for numbers that are not integers (b,), below 0, or more than ``rewindable``,
            or for a cache that was not made to go back. It is then unchanged.

        Example:
          >>> import jax.numpy as jnp, memcache_jax as mc
          >>> from flax import nnx
          >>> layer = mc.nn.MemoryCaching(8, 2, memory=mc.memories.SSD(), aggregation=mc.GRM(),
          ...                             segmentation=mc.Constant(4), rngs=nnx.Rngs(0))
          >>> _, cache = layer.extend(jnp.ones((2, 9, 8)), layer.init_cache(2, 20, rewind=5))
          >>> cache.rewind(jnp.array([5, 0])).position.tolist()
          [4, 9]
        """
        return taken_back_from(self, tokens, self.batch_size)

    def rewound(self: C, tokens: Int[Array, "b"]) -> C:
        """As ``rewind``, of traced values that are not checked."""
        raise ValueError(f"{type(self).__name__} does not go back by tokens")

    def borders(self, length: int) -> np.ndarray:
        """The positions up to ``length`` that rows may return to, 0 among them.

        Raises:
          ValueError: if the cache does not keep its state there.
        """
        raise ValueError(f"{type(self).__name__} does not return to a segment's begin")

    def returned(
        self: C, position: Int[Array, "b"], rows: Bool[Array, "b"]
    ) -> tuple[C, Bool[Array, "b"]]:
        """The marked rows as they were after ``position`` tokens, one of ``borders``.

        Returns:
          The cache, and the rows that are not marked or whose states it still has in full.
        """
        raise ValueError(f"{type(self).__name__} does not return to a segment's begin")

    def replace(self: C, **changes: Any) -> C:
        """Returns the cache with these fields replaced."""
        this: Any = self
        return dataclasses.replace(this, **changes)

    # For a stack of layers.

    @property
    def states(self) -> tuple:
        """The shared arrays, then the ``states`` of each nested cache."""
        return self._states(lambda x: x, lambda cache: cache.states)

    def with_states(self: C, states: tuple, first: Any = None) -> C:
        """Returns the cache with these shared arrays, of which its own is number ``first``."""
        changes = dict(zip(self.shared + self.nested, states, strict=True))
        for name in self.nested:
            changes[name] = getattr(self, name).with_states(changes[name], first)
        return self.replace(**changes, **({"first": first} if self.shared else {}))

    def own_rows(self, shared: Array) -> Array:
        """Returns this layer's rows of a shared array."""
        first = getattr(self, "first", None)
        if first is None:
            return shared
        return lax.dynamic_index_in_dim(shared, first, keepdims=False)

    def put_rows(self, shared: Array, rows: Array) -> Array:
        """Returns a shared array with this layer's rows replaced."""
        first, rows = getattr(self, "first", None), rows.astype(shared.dtype)
        if first is None:
            return rows
        return lax.dynamic_update_index_in_dim(shared, rows, first, axis=0)

    def empty_states(self, rows: int, *layers: int) -> tuple:
        """Allocates empty shared arrays of so many rows, for a stack of so many layers."""

        def empty(x: Array) -> Array:
            return jnp.zeros((*layers, rows, *x.shape[1:]), x.dtype)

        return self._states(
            lambda own: jax.tree.map(empty, own), lambda cache: cache.empty_states(rows, *layers)
        )

    def reset_states(self, rows: Array, axis: int = 0) -> tuple:
        """Returns the shared arrays with the marked rows zeroed: 0 * NaN is NaN in a read.

        Rows are along ``axis``, 1 in a stack of layers.
        """
        return self._states(
            lambda own: zero_rows(own, rows, axis), lambda cache: cache.reset_states(rows, axis)
        )

    def take_states(self, rows: Array, axis: int = 0) -> tuple:
        """Returns these rows of the shared arrays, along ``axis``."""
        return self._states(
            lambda own: take_rows(own, rows, axis), lambda cache: cache.take_states(rows, axis)
        )

    def letters(self: C, layers: bool = False) -> C:
        """Returns a tree of the letters of each field's axes, as ``sharding.Division`` has them.

        Args:
          layers: whether arrays are stacked, and have an axis of layers before the others.
        """
        of_small, of_shared = (". " if layers else ""), (". " if layers or self._in_stack else "")
        fields = {
            **{name: of_small + self.axes.get(name, "b") for name in self.small},
            **{name: of_shared + self.axes.get(name, "b") for name in self.shared},
            **{name: of_small + self.axes.get(name, ".") for name in self.common},
            **{name: cache.letters(layers) for name, cache in self._fields(self.nested).items()},
        }
        fields = {name: axes for name, axes in fields.items() if getattr(self, name) is not None}
        return self.replace(**fields, **({"first": ""} if self._in_stack else {}))

    @property
    def _in_stack(self) -> bool:
        return getattr(self, "first", None) is not None

    def take_small(self: C, rows: Array) -> C:
        """Returns the cache with these rows of small arrays, and copies of common ones."""
        changes = take_rows(self._fields(self.small), rows)
        changes |= jax.tree.map(jnp.copy, self._fields(self.common))
        nested = {name: cache.take_small(rows) for name, cache in self._fields(self.nested).items()}
        return self.replace(**changes, **nested)

    def _reset_small(self: C, rows: Array) -> C:
        changes = zero_rows(self._fields(self.zeroed), rows)
        nested = {n: cache._reset_small(rows) for n, cache in self._fields(self.nested).items()}
        return self.replace(**changes, **nested)

    def _fields(self, names: tuple[str, ...]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}

    def _states(self, own: Callable[[tuple], tuple], nested: Callable[[Any], tuple]) -> tuple:
        shared = tuple(self._fields(self.shared).values())
        return *own(shared), *map(nested, self._fields(self.nested).values())


def placed(make: Callable[[], T], sharding: NamedSharding | PartitionSpec | None) -> T:
    """Returns the cache that ``make`` makes, with rows and heads divided as ``sharding`` says.

    Raises:
      ValueError: for a sharding of other axes, or a PartitionSpec without a mesh.
    """
    if sharding is None:
        return make()
    division = Division.of_cache(sharding)

    def lay(letters: str, tree: Any) -> Any:
        return jax.tree.map(lambda x: division.lay(x, letters), tree)

    def laid() -> T:
        cache: Any = make()
        return jax.tree.map(lay, cache.letters(), cache)

    if isinstance(jnp.zeros(()), Tracer):  # where no mesh can be entered
        if jax.sharding.get_abstract_mesh() != division.mesh:
            raise ValueError(f"under jit, {sharding} needs its mesh in context: jax.set_mesh")
        return laid()
    if not isinstance(sharding, NamedSharding):
        return jax.jit(laid)()
    concrete: Any = sharding.mesh
    with jax.set_mesh(concrete):
        return jax.jit(laid)()


def zero_rows(tree: Any, rows: Array, axis: int = 0) -> Any:
    """Returns arrays with zeros in the marked rows (b,), which are along ``axis``."""

    def zero(x: Array) -> Array:
        marked = rows.reshape(*[1] * axis, -1, *[1] * (x.ndim - 1 - axis))
        return jnp.where(marked, jnp.zeros((), x.dtype), x)

    return jax.tree.map(zero, tree)


def take_rows(tree: Any, rows: Array, axis: int = 0) -> Any:
    """Returns these rows of arrays, along ``axis``, which lie as all rows do."""

    def take(x: Array) -> Array:
        axes, mesh = axes_of(x), context_mesh(x)
        if mesh is not None and len(rows) % num_devices(mesh, axes[axis]):
            axes[axis] = ()
        return by_compiler(lambda x, rows: jnp.take(x, rows, axis=axis), x, rows, axes=axes)

    return jax.tree.map(take, tree)


def short_repr(cache: Any) -> str:
    """A cache's class and bytes; its arrays would fill pages."""
    leaves = jax.tree.leaves(cache)
    arrays = all(hasattr(x, "shape") and hasattr(x, "dtype") for x in leaves)
    return f"{type(cache).__name__}({f'{count_bytes(leaves):,} bytes' if arrays else '...'})"


def count_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays or ``jax.ShapeDtypeStruct``s of a tree."""
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
