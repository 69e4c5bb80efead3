"""How one array lies on a mesh: read from its type, or asked for."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from memcache_jax._typing import Array

MeshAxes: TypeAlias = tuple[str, ...]
"""The axes of a mesh that divide one axis of an array, the outermost first."""

T = TypeVar("T")


def as_axes(entry: Any) -> MeshAxes:
    """An entry of a PartitionSpec as a tuple."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def context_mesh(*arrays: Any) -> AbstractMesh | None:
    """The mesh of ``jax.set_mesh``, else that of the arrays; None where there is nothing to divide.

    Arrays that were put on a mesh with Explicit axes carry it in their types.
    """
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(x).sharding.mesh for x in arrays)]
    mesh = next((mesh for mesh in meshes if not mesh.empty), None)
    if mesh is None or not (explicit_axes(mesh) or auto_axes(mesh)):
        return None
    return mesh if explicit_axes(mesh) or mesh.size > 1 else None


def explicit_axes(mesh: AbstractMesh) -> MeshAxes:
    """The axes by which arrays' types say how they are divided."""
    return _of_type(mesh, AxisType.Explicit)


def check_not_mapped_over() -> None:
    """Raises ValueError within a ``run`` of a ``jax.vmap`` over an axis that a mesh divides.

    Such an axis stays Explicit where all others have been divided by hand.
    """
    if left := explicit_axes(jax.sharding.get_abstract_mesh()):
        raise ValueError(
            f"jax.vmap goes over an axis of the arguments that the mesh divides over "
            f"{', '.join(left)}: make it part of the rows b instead, or call jax.vmap within "
            "jax.shard_map"
        )


def auto_axes(mesh: AbstractMesh) -> MeshAxes:
    """The axes over which the compiler divides."""
    return _of_type(mesh, AxisType.Auto)


def _of_type(mesh: AbstractMesh, kind: AxisType) -> MeshAxes:
    pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, of_axis in pairs if of_axis == kind)


def axes_of(x: Any) -> list[MeshAxes]:
    """The Explicit axes that divide each axis of an array."""
    kind = jax.typeof(x)
    entries = [as_axes(entry) for entry in kind.sharding.spec]
    return entries + [()] * (len(kind.shape) - len(entries))


def as_spec(axes: Sequence[MeshAxes]) -> PartitionSpec:
    """A PartitionSpec of axes for each axis of an array."""
    return PartitionSpec(*(each[0] if len(each) == 1 else each or None for each in axes))


def lay_out(x: Array, mesh: AbstractMesh, axes: Sequence[MeshAxes]) -> Array:
    """Divides each axis of an array over axes of the mesh, as far as they divide it evenly."""
    explicit, auto = explicit_axes(mesh), auto_axes(mesh)
    axes = dividing(axes, x, mesh)
    if explicit and any(only(axes, auto)) and not isinstance(x, Tracer):
        # Outside jit each of the two steps below would undo the other.
        return jax.jit(lambda x: lay_out(x, mesh, axes))(x)
    if explicit and only(axes, explicit) != axes_of(x):
        x = jax.sharding.reshard(x, NamedSharding(mesh, as_spec(only(axes, explicit))))
    if any(only(axes, auto)):
        sharding = NamedSharding(mesh, as_spec(only(axes, auto)))
        x = jax.lax.with_sharding_constraint(x, sharding)
    return x


def like(x: Array, y: Array) -> Array:
    """Divides ``y`` as the type of ``x``, of the same shape, shows."""
    mesh = context_mesh(x)
    if mesh is None or axes_of(x) == axes_of(y):
        return y
    return jax.sharding.reshard(y, NamedSharding(mesh, as_spec(axes_of(x))))


def by_compiler(f: Callable[..., T], *args: Array, axes: Sequence[MeshAxes]) -> T:
    """Returns ``f(*args)``, which the compiler divides as it will, laid out over Explicit axes.

    If it is a tree of arrays, ``axes`` are the first ones of each.
    """
    mesh = context_mesh(*args)
    if mesh is None or not explicit_axes(mesh):
        return f(*args)
    sharding = NamedSharding(mesh, as_spec(only(axes, explicit_axes(mesh))))
    automatic: Any = jax.sharding.auto_axes(f, axes=explicit_axes(mesh), out_sharding=sharding)
    return automatic(*args)


def only(axes: Sequence[MeshAxes], among: MeshAxes) -> list[MeshAxes]:
    """The axes that are among these."""
    return [tuple(axis for axis in each if axis in among) for each in axes]


def dividing(axes: Sequence[MeshAxes], x: Any, mesh: Mesh | AbstractMesh) -> list[MeshAxes]:
    """The axes of the mesh that divide an array evenly.

    Of several over one axis of the array, the last are dropped until the others divide it.
    """
    axes = [*axes, *[()] * (len(x.shape) - len(axes))]
    return [_dividing(size, each, mesh) for size, each in zip(x.shape, axes, strict=True)]


def _dividing(size: int, axes: MeshAxes, mesh: Mesh | AbstractMesh) -> MeshAxes:
    while size % num_devices(mesh, axes):
        axes = axes[:-1]
    return axes


def num_devices(mesh: Mesh | AbstractMesh, axes: MeshAxes) -> int:
    """Number of devices along axes of the mesh."""
    return math.prod(mesh.shape[axis] for axis in axes)
