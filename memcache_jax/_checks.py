"""Checks of what users give, made before anything is traced."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from memcache_jax.aggregation import Aggregation
from memcache_jax.memories import Memory
from memcache_jax.segmentation import Constant


def check_choice(name: str, got: Any, choices: tuple) -> None:
    """Raises ValueError unless ``got`` is one of ``choices``."""
    if got not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {got!r}")


def check_names(what: str, got: Mapping, wanted: Mapping, optional: tuple = ()) -> None:
    """Raises ValueError unless ``got`` has the names of ``wanted`` (those optional may lack)."""
    unknown = sorted(set(got) - set(wanted))
    missing = sorted(set(wanted) - set(got) - set(optional))
    if unknown or missing:
        raise ValueError(
            f"{what} must be {sorted(wanted) or 'empty'}"
            + (f"; missing: {missing}" if missing else "")
            + (f"; unknown: {unknown}" if unknown else "")
        )


def check_shape(what: str, array: jax.Array, wanted: tuple[int, ...], axes: str) -> None:
    """Raises ValueError unless ``array`` is a floating-point array of the wanted shape."""
    if jnp.shape(array) != wanted:
        raise ValueError(f"{what} must have shape ({axes}) = {wanted}, got {jnp.shape(array)}")
    if not jnp.issubdtype(jnp.result_type(array), jnp.floating):
        raise ValueError(f"{what} must be floating point, got {jnp.result_type(array)}")


def check_memory_caching(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    connector: jax.Array | None,
    memory: Any,
    controls: Mapping,
    weights: Mapping,
    aggregation: Any,
    segmentation: Any,
) -> None:
    """Raises ValueError unless the arguments of ``memory_caching`` fit each other."""
    check_configuration(memory, aggregation, segmentation)
    name = type(memory).__name__
    if jnp.ndim(key) != 4 or jnp.ndim(value) != 4:
        raise ValueError(
            "key must be (b, t, h, k) and value (b, t, h, v), got "
            f"key {jnp.shape(key)}, value {jnp.shape(value)}"
        )
    b, t, h, k = jnp.shape(key)
    v = jnp.shape(value)[-1]
    if 0 in jnp.shape(key):
        raise ValueError(f"nothing is to be read: key has shape (b, t, h, k) = {key.shape}")
    check_shape("key", key, (b, t, h, k), "b, t, h, k")
    check_shape("query", query, (b, t, h, k), "b, t, h, k")
    check_shape("value", value, (b, t, h, v), "b, t, h, v")
    if connector is not None:
        check_shape("connector", connector, (b, t, h, k), "b, t, h, k")
    elif aggregation.needs_connector:
        raise ValueError(
            f"{aggregation} compares a connector with pooled keys: pass connector, shape "
            f"(b, t, h, k) = {(b, t, h, k)} (the query may serve as one)"
        )

    sizes = dict(b=b, t=t, h=h, k=k, v=v)
    optional = tuple(n for n, control in memory.controls.items() if control.optional)
    check_names(f"controls of {name}", controls, memory.controls, optional)
    for control, array in controls.items():
        axes = memory.controls[control].axes.split()
        check_shape(f"control {control}", array, tuple(sizes[a] for a in axes), ", ".join(axes))

    shapes = memory.weight_shapes(k, v)
    check_names(f"weights of {name}", weights, shapes)
    for weight, shape in shapes.items():
        check_shape(f"weight {weight}", weights[weight], (h, *shape), "h, out, in")


def check_heads(in_features: int, num_heads: int, head_dim: int | None) -> int:
    """Returns the dimension of a head, or raises ValueError."""
    for name, size in (("in_features", in_features), ("num_heads", num_heads)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if head_dim is None and in_features % num_heads:
        raise ValueError(
            f"num_heads={num_heads} must divide in_features={in_features}, or give head_dim"
        )
    if head_dim is not None and head_dim < 1:
        raise ValueError(f"head_dim must be at least 1, got {head_dim}")
    return in_features // num_heads if head_dim is None else head_dim


def check_input(x: jax.Array, in_features: int) -> None:
    """Raises ValueError unless ``x`` is (b, t, in_features)."""
    if x.ndim != 3 or x.shape[-1] != in_features:
        raise ValueError(
            f"the input must be (b, t, d) with d = in_features = {in_features}, got shape {x.shape}"
        )


def check_configuration(memory: Any, aggregation: Any, segmentation: Any) -> None:
    """Raises ValueError unless each is an instance, and the chunk size divides the segment's."""
    for what, got, wanted, example in (
        ("memory", memory, Memory, "mc.memories.Titans(chunk_size=64)"),
        ("aggregation", aggregation, Aggregation, "mc.GRM()"),
        ("segmentation", segmentation, Constant, "mc.Constant(256)"),
    ):
        if not isinstance(got, wanted):
            raise ValueError(f"{what} must be an object such as {example}, got {got!r}")
    if memory.gradient_chunk and segmentation.size % memory.gradient_chunk:
        raise ValueError(
            f"the chunk size of {type(memory).__name__}, {memory.gradient_chunk}, must divide the "
            f"segment size, got {segmentation}"
        )
