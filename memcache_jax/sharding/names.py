"""The names of arrays' axes (``"batch"``, ``"heads"``), and the mesh's axes that stand for them.

A host's logical rules in context (``flax.core.spmd.logical_axis_rules``) come first. Without them
the axes of ``make_mesh`` have rules of their own, and on any other mesh a name stands for nothing.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
from flax import nnx
from flax.core.spmd import get_logical_axis_rules
from jax.sharding import AbstractMesh

from memcache_jax._checks import check_mapping, shown
from memcache_jax._typing import Array
from memcache_jax.sharding.layout import (
    MeshAxes,
    as_axes,
    context_mesh,
    dividing,
    explicit_axes,
    lay_out,
)
from memcache_jax.sharding.mesh import AXES

AxisNames: TypeAlias = Mapping[str, str | tuple[str, ...] | None]

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "time": "seq",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "embed": ("fsdp", "seq"),  # of parameters; activations are whole along it
    "layers": None,
    "experts": None,
}
"""The axes of ``make_mesh``'s meshes for each name."""

# Other names of activations' axes: those of Flax's examples and of MaxText.
_ALIASES = {
    "batch": ("activation_batch",),
    "time": ("length", "activation_length"),
    "heads": ("activation_heads",),
}


def mesh_axes(name: str, mesh: AbstractMesh) -> MeshAxes:
    """The axes of the mesh that an axis of this name is divided over."""
    rules = _rules_in_context()
    for alias in (name, *_ALIASES.get(name, ())):
        if alias in rules:
            return _known(rules[alias], mesh)
    return _known(RULES[name], mesh) if name in RULES and _is_ours(mesh) else ()


def constrain(x: Array, *names: str | None) -> Array:
    """Lays an array out by its axes' names; returns it unchanged where they stand for nothing.

    Example:
      >>> import jax.numpy as jnp, memcache_jax as mc
      >>> mc.sharding.constrain(jnp.ones((2, 3, 4)), "batch", "time", None).shape
      (2, 3, 4)
    """
    mesh = context_mesh()
    # Within a shard_map, arrays are already divided.
    if mesh is None or mesh.manual_axes:
        return x
    axes = [() if name is None else mesh_axes(name, mesh) for name in names]
    return lay_out(x, mesh, axes) if any(axes) else x


def partitioned(init: Callable[..., Array], *names: str | None) -> Callable[..., Any]:
    """An initialiser whose parameter carries the names of its axes, as Flax does.

    In Flax a name that no rule knows is an axis of the mesh, and an error where the mesh has none
    of that name. Here it stands for nothing then. On a mesh the parameter is made where it belongs.
    """
    given = _naming.names
    names = names if given is None else tuple(_given(given, name) for name in names)

    rules: dict[str, Any] = {} if given is not None else {"sharding_rules": DEFAULT_RULES}

    def create(*args: Any, **kwargs: Any) -> Any:
        value, mesh, eager = init(*args, **kwargs), context_mesh(), False
        if mesh is not None and not mesh.manual_axes:
            axes = [_of_param(name, mesh, given is not None) for name in names]
            # What is made from parameters, such as an optimizer's state, is then divided as they
            # are. Flax does so where all names fit; types of Explicit axes do so by themselves.
            evenly = axes == dividing(axes, value, mesh)
            eager = any(axes) and evenly and not explicit_axes(mesh)
            value = lay_out(value, mesh, axes) if any(axes) else value
        make = nnx.with_partitioning(lambda: value, names, eager_sharding=eager, **rules)
        return make()

    return create


@contextlib.contextmanager
def naming(names: AxisNames | None) -> Iterator[None]:
    """Gives the parameters that are made within it a host's names; None changes nothing.

    Raises:
      ValueError: for the name of an axis that parameters do not have.
    """
    known = [name for name in RULES if name not in ("batch", "time")]
    given = check_mapping("axis_names", names)
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"axis_names are for {', '.join(known)}; got {', '.join(unknown)}")
    for ours, theirs in given.items():
        of_strings = isinstance(theirs, tuple) and all(isinstance(name, str) for name in theirs)
        if not (theirs is None or isinstance(theirs, str) or of_strings):
            raise ValueError(
                f"axis_names[{ours!r}] must be a name, a tuple of names or None, got "
                f"{shown(theirs)}"
            )
    before = _naming.names
    _naming.names = before if names is None else given
    try:
        yield
    finally:
        _naming.names = before


def partition_name(name: str) -> Any:
    """What an axis of this name is called in the parameters that are being made."""
    return name if _naming.names is None else _given(_naming.names, name)


@dataclasses.dataclass(frozen=True)
class DefaultRules:
    """The rules of a parameter for names that the rules in context do not have."""

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        known = _rules_in_context()
        ours = _is_ours(jax.sharding.get_abstract_mesh())
        return iter([(name, RULES[name] if ours else None) for name in RULES if name not in known])


DEFAULT_RULES = DefaultRules()


class _Naming(threading.local):
    names: AxisNames | None = None


_naming = _Naming()


def _given(names: AxisNames, name: str | None) -> Any:
    return None if name is None else names.get(name)


def _of_param(name: Any, mesh: AbstractMesh, hosts: bool) -> MeshAxes:
    """The axes of a mesh for the name of a parameter's axis: ours, or one that a host gave."""
    rules = _rules_in_context()
    if name is None or (isinstance(name, str) and name in rules):
        return _known(rules.get(name), mesh)
    return _known(name, mesh) if hosts else mesh_axes(name, mesh)


def _known(axes: Any, mesh: AbstractMesh) -> MeshAxes:
    return tuple(axis for axis in as_axes(axes) if axis in mesh.axis_names)


def _rules_in_context() -> dict[Any, Any]:
    """The rules of the host; of several for one name the last holds, as in NNX."""
    rules: Any = get_logical_axis_rules()
    return {rule[0]: rule[1] for rule in rules or ()}


def _is_ours(mesh: AbstractMesh) -> bool:
    return set(mesh.axis_names) == set(AXES)
