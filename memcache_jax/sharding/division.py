"""Where tokens lie on a mesh: which of its axes divide their rows, their time and their heads.

Explicit axes are read from the arrays' own types, whatever they are called. Of Auto axes a type
says nothing; there it is the logical rules in context that say it, or those of ``make_mesh``.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from memcache_jax._typing import Array
from memcache_jax.sharding.layout import (
    MeshAxes,
    as_axes,
    as_spec,
    auto_axes,
    axes_of,
    by_compiler,
    context_mesh,
    explicit_axes,
    lay_out,
    num_devices,
    only,
)
from memcache_jax.sharding.names import mesh_axes

_NAMES = dict(e="experts", b="batch", t="time", h="heads", w="vocab")


@dataclasses.dataclass(frozen=True)
class Division:
    """The axes of a mesh that divide tokens.

    An axis of an array goes by its letter in the legend: ``b`` rows, ``t`` time, ``h`` heads, ``e``
    experts, ``w`` the words of a vocabulary. All other axes are whole on every device.

    Attributes:
      mesh: the mesh.
      b: the axes that divide rows, the outermost first.
      t: those that divide time.
      h: those that divide heads.
      e: those that divide experts, over which rows are then whole.
      w: those that divide words.
    """

    mesh: AbstractMesh
    b: MeshAxes = ()
    t: MeshAxes = ()
    h: MeshAxes = ()
    e: MeshAxes = ()
    w: MeshAxes = ()

    @classmethod
    def of(cls, *arrays: tuple[Any, str], heads: int | None = None) -> "Division | None":
        """Returns how arrays are divided; None where that is no matter, or the compiler's.

        Args:
          arrays: pairs of an array, or None, and its axes' letters, such as ``"b t h k"``. The
            first of those that are divided along an axis decides.
          heads: number of heads, where an array has them in one axis with their dimension.
        """
        given = [(x, letters.split()) for x, letters in arrays if x is not None]
        mesh = context_mesh(*(x for x, _ in given))
        if mesh is None:
            return None
        found: dict[str, MeshAxes] = {}
        for letter in _NAMES:
            places = [(x, axes.index(letter)) for x, axes in given if letter in axes]
            if not places:
                continue
            divided = (axes_of(x)[axis] for x, axis in places)
            axes = next((axes for axes in divided if axes), ())
            axes += _ruled(letter, mesh)
            axes = tuple(a for a in axes if not any(a in others for others in found.values()))
            x, axis = places[0]
            size = heads if letter == "h" and heads else x.shape[axis]
            # Time need not divide evenly: it is padded.
            while letter != "t" and size % num_devices(mesh, axes):
                axes = axes[:-1]
            found[letter] = axes
        if not explicit_axes(mesh) and not any(found.values()):
            return None
        return cls(mesh, **found)

    @classmethod
    def of_cache(cls, sharding: NamedSharding | PartitionSpec) -> "Division":
        """Returns the division of a cache whose rows, and then heads, are divided so.

        Raises:
          ValueError: for a sharding of more axes, or a PartitionSpec without a mesh.
        """
        mesh, spec = jax.sharding.get_abstract_mesh(), sharding
        if isinstance(sharding, NamedSharding):
            mesh, spec = sharding.mesh.abstract_mesh, sharding.spec
        if not isinstance(spec, PartitionSpec) or len(spec) > 2:
            raise ValueError(
                "a cache's sharding must be a NamedSharding or PartitionSpec of rows, or of rows "
                f"and heads, such as P('data', 'model'); got {sharding}"
            )
        if mesh.empty:
            raise ValueError(
                f"{sharding} needs a mesh: give a NamedSharding, or call under jax.set_mesh"
            )
        rows, heads = [*map(as_axes, spec), (), ()][:2]
        if unknown := sorted({*rows, *heads} - set(mesh.axis_names)):
            raise ValueError(
                f"the mesh has the axes {', '.join(mesh.axis_names)}; got {', '.join(unknown)}"
            )
        return cls(mesh, b=rows, h=heads)

    @property
    def parts(self) -> int:
        """Number of parts that time is divided into."""
        return num_devices(self.mesh, self.t)

    @property
    def time_axis(self) -> Any:
        """The axis that divides time, or several, as ``jax.lax``'s collectives take them."""
        return self.t[0] if len(self.t) == 1 else self.t

    @property
    def is_explicit(self) -> bool:
        """Whether arrays' types say how they are divided."""
        return bool(explicit_axes(self.mesh))

    def whole(self, *letters: str) -> "Division":
        """The division with these axes whole."""
        return dataclasses.replace(self, **dict.fromkeys(letters, ()))

    def even(self, length: int, least: int = 1) -> "Division | None":
        """The division for parts of equal length; None where the compiler has to divide them.

        A part has at least so many tokens.
        """
        if self.parts == 1 or (length % self.parts == 0 and length // self.parts >= least):
            return self
        return self.whole("t") if self.is_explicit else None

    def spec(self, letters: str) -> PartitionSpec:
        """The layout of an array with these axes."""
        return as_spec(self._axes(letters))

    def lay(self, x: Array, letters: str) -> Array:
        """Lays an array out, as far as its axes divide evenly."""
        return lay_out(x, self.mesh, self._axes(letters))

    def run(self, local: Callable[..., Any], args: tuple, letters: tuple, out: Any) -> Any:
        """Returns ``local(*args)``, for which each device computes its own part.

        Args:
          local: the computation of one part, on arrays of that part.
          args: trees of arrays.
          letters: their axes; for each a string, or a tree of strings.
          out: those of the result.
        """
        explicit, auto = explicit_axes(self.mesh), auto_axes(self.mesh)
        specs, out_specs = jax.tree.map(self.spec, (letters, out))

        def lay(letters: str, tree: Any) -> Any:
            axes = only(self._axes(letters), explicit)
            return jax.tree.map(lambda x: lay_out(x, self.mesh, axes), tree)

        if explicit:
            args = jax.tree.map(lay, letters, args)
        options: dict[str, Any] = dict(mesh=self.mesh)
        if auto or self.mesh.manual_axes:
            ruled = {axis for letter in "bth" for axis in _ruled(letter, self.mesh)}
            ruled |= {*self.e, *self.w}
            options["axis_names"] = {*explicit, *(axis for axis in auto if axis in ruled)}
        elif not jax.sharding.get_abstract_mesh().empty:
            options = {}  # all axes but those over which a vmap goes
        divided = tuple(options.get("axis_names", self.mesh.axis_names))
        dtypes = jax.tree.map(lambda x: x.dtype, args)
        args = jax.tree.map(functools.partial(self._summable, axes=divided), letters, args)

        def narrowed(*args: Any) -> Any:
            return local(*jax.tree.map(lambda x, dtype: x.astype(dtype), args, dtypes))

        mapped = jax.shard_map(
            narrowed, in_specs=specs, out_specs=out_specs, check_vma=False, **options
        )
        # Outside jit, JAX 0.10 does not take a mesh of which only some axes are manual.
        return jax.jit(mapped)(*args) if explicit else mapped(*args)

    def compute(self, f: Callable[[Array], Array], x: Array, letters: str) -> Array:
        """Returns ``f(x)``, which the compiler divides as it will, laid out by its axes."""
        return by_compiler(f, x, axes=self._axes(letters))

    def _summable(self, letters: str, tree: Any, axes: MeshAxes) -> Any:
        """Makes what devices along these axes have alike float32: its gradient is their sum.

        XLA on CPUs dies of such a sum in bfloat16, and it would round elsewhere.
        """
        own = {axis for each in self._axes(letters) for axis in each}
        if num_devices(self.mesh, tuple(axis for axis in axes if axis not in own)) == 1:
            return tree

        def wide(x: Array) -> Array:
            if not jnp.issubdtype(x.dtype, jnp.floating):
                return x
            return x.astype(jnp.promote_types(x.dtype, jnp.float32))

        return jax.tree.map(wide, tree)

    def _axes(self, letters: str) -> list[MeshAxes]:
        return [getattr(self, letter) if letter in _NAMES else () for letter in letters.split()]


def _ruled(letter: str, mesh: AbstractMesh) -> MeshAxes:
    """The Auto axes that rules give to an axis of tokens."""
    # Within a shard_map, arrays are already divided.
    auto = () if mesh.manual_axes else auto_axes(mesh)
    return tuple(axis for axis in mesh_axes(_NAMES[letter], mesh) if axis in auto)
