"""The mesh that training makes for itself."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from memcache_jax._checks import check_integer, check_mapping, shown

AXES = ("data", "fsdp", "seq", "tensor")
"""Copies of the model; shards of it that are gathered for use; shards of time; shards of heads.

Parameters are divided over the parts of a sequence too, since all of them use all parameters.
"""


def make_mesh(
    sizes: Mapping[str, int], *, slices: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Returns a mesh with the axes ``data``, ``fsdp``, ``seq`` and ``tensor``, in this order.

    Neighbors along the later axes are neighbors in the hardware, where there is the most traffic.

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
    if devices is not None and not isinstance(devices, (Sequence, np.ndarray)):
        raise ValueError(f"devices must be a list of devices, got {shown(devices)}")
    devices = list(jax.devices() if devices is None else np.ravel(np.array(devices, object)))
    if wrong := [device for device in devices if not hasattr(device, "platform")]:
        raise ValueError(f"devices must be a list of devices, got {shown(wrong[0])} in it")
    sizes, slices = check_mapping("the sizes of a mesh", sizes), check_integer("slices", slices)
    if unknown := sorted(set(sizes) - set(AXES)):
        raise ValueError(f"a mesh has the axes {', '.join(AXES)}, got {', '.join(unknown)}")
    shape = [check_integer(f"the mesh's {axis}", sizes.get(axis, 1), -1) for axis in AXES]
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
