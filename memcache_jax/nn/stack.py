"""Layers of one shape, whose parameters are stacked along a first axis and run by a scan."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from memcache_jax._eager import compiled, is_value
from memcache_jax._varying import vary, varying
from memcache_jax.kernels._dispatch import is_traced
from memcache_jax.sharding.layout import as_axes, axes_of, context_mesh, explicit_axes, lay_out
from memcache_jax.sharding.names import partition_name

_STACKED = "stacked"


def make_stack(make: Callable[[nnx.Rngs], Any], repeats: int, rngs: nnx.Rngs) -> Any:
    """Returns one module whose parameters are those of ``repeats`` modules, stacked."""

    @nnx.split_rngs(splits=repeats)
    @nnx.vmap(in_axes=0, out_axes=0)
    @nnx.transform_metadata(in_axes=None, out_axes=0, partition=partition_name("layers"))
    def stack(rngs: nnx.Rngs) -> Any:
        return make(rngs)

    layers, mesh = stack(rngs), context_mesh()
    for _, param in nnx.to_flat_state(nnx.state(layers)):
        param.set_metadata(**{_STACKED: True})
    if mesh is not None and not mesh.manual_axes:
        for _, param in nnx.to_flat_state(nnx.state(layers, nnx.Param)):
            axes = [as_axes(entry) for entry in nnx.get_partition_spec(param).get_value()]
            known = [tuple(axis for axis in each if axis in mesh.axis_names) for each in axes]
            if any(known):
                param.set_value(lay_out(param[...], mesh, known))
    return layers


def repeats_of(module: nnx.Module) -> int | None:
    """The number of layers that a module in a stack stands for; None outside stacks."""
    params = (param for _, param in nnx.to_flat_state(nnx.state(module, nnx.Param)))
    stacked = (param for param in params if param.get_metadata().get(_STACKED))
    return next((jnp.shape(param.get_value())[0] for param in stacked), None)


def scan_stack(
    layers: Any,
    repeats: int,
    apply: Callable[..., tuple[Any, Any]],
    carry: Any,
    inputs: Any = None,
    constants: Any = None,
    *,
    settle: bool = False,
    wrap: Callable[[Callable], Callable] | None = None,
) -> tuple[Any, Any]:
    """Runs ``apply(layer, carry, input, constants)`` layer by layer.

    What others attach to the layers, such as the variables of ``nnx.capture``, is no layer's own
    unless it is stacked too. Each layer sees it as it is, and what they make of it is stacked.

    Args:
      layers: from ``make_stack``.
      repeats: number of layers.
      apply: one layer's part. Eager calls compile a module-level function once per shape.
      carry: what goes from layer to layer.
      inputs: a tree of arrays (repeats, ...).
      constants: a tree of arrays that all layers see.
      settle: whether a layer may divide the carry over Explicit axes otherwise than it finds it.
      wrap: a transformation of the scan's body, such as ``jax.checkpoint``.

    Returns:
      The last carry, and all outputs stacked.
    """
    for part in vars(layers).values():
        if isinstance(part, nnx.List):  # nothing to see there, and Flax 0.12.8 cannot split it
            vars(part).pop("__captures__", None)
    graph, stacked, attached = nnx.split(layers, _is_stacked(layers, repeats), ...)
    carry = vary(carry, varying((carry, stacked, inputs)))
    arrays = carry, (stacked, inputs), attached, constants
    how: dict[str, Any] = dict(graph=graph, apply=apply, settle=settle, wrap=wrap)
    leaves = jax.tree.leaves((carry, stacked, inputs))
    once = "<locals>" not in apply.__qualname__ and not is_traced(*leaves)
    once = once and context_mesh(*leaves) is None and _has_values(layers)
    carry, (outputs, captured) = compiled(_scan, *arrays, **how) if once else _scan(*arrays, **how)
    if captured:
        nnx.update(layers, captured)
    return carry, outputs


def _has_values(layers: Any) -> bool:
    """Whether all static attributes of the modules compare by value."""
    parts = (nnx.Pytree, nnx.Variable)
    return all(
        is_value(x)
        for _, module in nnx.iter_modules(layers)
        for name, x in vars(module).items()
        if not (name.startswith("_pytree__") or isinstance(x, parts))
    )


def _scan(
    carry: Any,
    layers: tuple,
    attached: nnx.State,
    constants: Any,
    *,
    graph: nnx.GraphDef,
    apply: Callable[..., tuple[Any, Any]],
    settle: bool,
    wrap: Callable[[Callable], Callable] | None,
) -> tuple[Any, tuple]:
    """The last carry, all outputs, and what the layers left in variables that hosts attach."""

    def body(carry: Any, layer: tuple) -> tuple[Any, tuple]:
        state, given = layer
        before = nnx.merge_state(state, attached)
        own = jax.tree.map(lambda x: x, before)  # variables of its own, with the same arrays
        module = nnx.merge(graph, own)
        carry, out = apply(module, carry, given, constants)
        return carry, (out, _captured(module, before))

    carry = _settled(body, carry, layers) if settle else carry
    return lax.scan(body if wrap is None else wrap(body), carry, layers)


def _settled(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, layers: Any) -> Any:
    """The carry, divided as the first layer leaves it: a scan's carry keeps its type."""
    mesh = context_mesh(*jax.tree.leaves(carry))
    if mesh is None or not explicit_axes(mesh):
        return carry
    after: Any = None

    def one(carry: Any, layer: Any) -> None:
        nonlocal after
        after = jax.tree.map(axes_of, body(carry, layer)[0])

    jax.eval_shape(one, carry, jax.tree.map(lambda x: x[0], layers))
    return jax.tree.map(lambda x, axes: lay_out(x, mesh, axes), carry, after)


def _captured(module: Any, before: Any) -> Any:
    """What a call has left in variables that are neither parameters nor random states."""
    given = {path: jax.tree.leaves(variable) for path, variable in nnx.to_flat_state(before)}

    def has_changed(path: Any, variable: Any) -> bool:
        leaves, old = jax.tree.leaves(variable), given.get(tuple(path), [])
        return len(leaves) != len(old) or any(a is not b for a, b in zip(leaves, old, strict=True))

    return nnx.state(module, nnx.All(nnx.Not(nnx.Any(nnx.Param, nnx.RngState)), has_changed))


def layer_of(layers: Any, repeats: int, index: int) -> Any:
    """Returns one layer of a stack."""
    graph, stacked, attached = nnx.split(layers, _is_stacked(layers, repeats), ...)
    return nnx.merge(graph, jax.tree.map(lambda x: x[index], stacked), attached)


def _is_stacked(layers: Any, repeats: int) -> Callable[[Any, Any], bool]:
    """Tells the variables of all layers from those that hosts attach for all of them together.

    A variable that was not made with the layers is stacked if all such variables of its module have
    a first axis of that size.
    """
    fits: dict[tuple, bool] = {}
    for path, variable in nnx.to_flat_state(nnx.state(layers)):
        if not variable.get_metadata().get(_STACKED):
            leaves = jax.tree.leaves(variable)
            own = bool(leaves) and all(jnp.shape(x)[:1] == (repeats,) for x in leaves)
            fits[path[:-1]] = fits.get(path[:-1], True) and own

    def is_stacked(path: Any, variable: Any) -> bool:
        made = variable.get_metadata().get(_STACKED)
        return bool(made) or fits.get(tuple(path)[:-1], False)

    return is_stacked
