"""The mesh, and the table that maps the named axes of arrays (``"batch"``, ``"heads"``) to it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from memcache_jax._typing import Array

AXES = ("data", "fsdp", "seq", "tensor")
"""Copies of the model; shards of it that are gathered for use; shards of time; shards of heads.

Parameters are divided over the parts of a sequence too, since all of them use all parameters.
"""

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "time": "seq",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "embed": ("fsdp", "seq"),  # of parameters; activations are whole along it
    "layers": None,
}
"""The mesh's axes for each named axis of an array."""


def make_mesh(
    sizes: Mapping[str, int], *, slices: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Returns a mesh with the axes ``data``, ``fsdp``, ``seq`` and ``tensor``, in this order.

    Neighbours along the later axes are neighbours in the hardware, where there is the most traffic.

    Args:
      sizes: devices along each axis, 1 by default; one may be -1, for all remaining devices.
      slices: number of TPU slices, or hosts, connected by a slower network. They divide the
        ``data`` axis, or ``fsdp`` if ``data`` is not a multiple of them.
      devices: all devices by default.

    Raises:
      ValueError: for an unknown axis, or sizes whose product is not the number of devices.

    Example:
      >>> import jax, memcache_jax as mc
      >>> mc.sharding.make_mesh({"fsdp": -1}, devices=jax.devices()[:1]).axis_names
      ('data', 'fsdp', 'seq', 'tensor')
    """
    devices = list(jax.devices() if devices is None else devices)
    if unknown := sorted(set(sizes) - set(AXES)):
        raise ValueError(f"a mesh has the axes {', '.join(AXES)}, got {', '.join(unknown)}")
    shape = [sizes.get(axis, 1) for axis in AXES]
    known = math.prod(size for size in shape if size != -1)
    if shape.count(-1) == 1 and known > 0:
        shape = [len(devices) // known if size == -1 else size for size in shape]
    if min(shape) < 1 or math.prod(shape) != len(devices):
        given = ", ".join(f"{axis}={sizes.get(axis, 1)}" for axis in AXES)
        raise ValueError(f"there are {len(devices)} devices, which a mesh of {given} does not fill")
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES)
    over = next((i for i in (0, 1) if shape[i] % slices == 0), None)
    if over is None:
        raise ValueError(
            f"data={shape[0]} or fsdp={shape[1]} must be a multiple of the {slices} slices"
        )
    across = [slices if i == over else 1 for i in range(len(AXES))]
    within = [size // other for size, other in zip(shape, across, strict=True)]
    by_process = not hasattr(devices[0], "slice_index")
    grid = mesh_utils.create_hybrid_device_mesh(
        within, across, devices, process_is_granule=by_process, allow_split_physical_axes=True
    )
    return Mesh(grid, AXES)


def active_mesh() -> AbstractMesh | None:
    """The mesh of ``jax.set_mesh`` if it has our axes and more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    ours = not mesh.empty and set(mesh.axis_names) == set(AXES)
    # Within a shard_map, arrays are already divided.
    return mesh if ours and mesh.size > 1 and not mesh.manual_axes else None


def spec(*names: str | None) -> PartitionSpec:
    """The layout of an array with axes of these names; None for an axis that is not divided."""
    return PartitionSpec(*(None if name is None else RULES[name] for name in names))


def constrain(x: Array, *names: str | None) -> Array:
    """Lays an array out by its axes' names; returns it unchanged without a mesh.

    Example:
      >>> import jax.numpy as jnp, memcache_jax as mc
      >>> mc.sharding.constrain(jnp.ones((2, 3, 4)), "batch", "time", None).shape
      (2, 3, 4)
    """
    mesh = active_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, fit(spec(*names), x, mesh))


def fit(layout: PartitionSpec, x: Any, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The layout without the axes of the mesh that do not divide the array evenly.

    Of several mesh axes over one array axis, the last are dropped until the others divide it.
    """

    def dividing(size: int, axes: Any) -> Any:
        while isinstance(axes, tuple) and size % _devices(mesh, axes):
            axes = axes[:-1] or None
        return None if size % _devices(mesh, axes) else axes

    axes = (*layout, *[None] * (len(x.shape) - len(layout)))
    return PartitionSpec(*(dividing(*pair) for pair in zip(x.shape, axes, strict=True)))


def partitioned(init: Callable[..., Array], *names: str | None) -> Callable[..., Any]:
    """An initialiser whose parameter carries the names of its axes, as Flax does."""
    return nnx.with_partitioning(init, names, eager_sharding=False)


def num_devices(mesh: Mesh | AbstractMesh, name: str) -> int:
    """Number of devices that an axis of this name is divided over."""
    return _devices(mesh, RULES[name])


def _devices(mesh: Mesh | AbstractMesh, axes: str | tuple[str, ...] | None) -> int:
    """Number of devices along one axis of the mesh, several, or none."""
    every = axes if isinstance(axes, tuple) else (axes,)
    return math.prod(mesh.shape[axis] for axis in every if axis is not None)
