"""Checks of the functional core's arguments, made before anything is traced."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from memcache_jax import _checks
from memcache_jax.aggregation import Aggregation
from memcache_jax.memories import Memory
from memcache_jax.segmentation import Segmentation


def check_arguments(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    connector: jax.Array | None,
    memory: Any,
    controls: Mapping,
    weights: Mapping | None,
    aggregation: Any,
    segmentation: Any,
    document_ids: jax.Array | None,
) -> None:
    """Raises ValueError unless the arguments of ``memory_caching`` fit each other.

    Where weights are None they have been checked before.
    """
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
    _checks.check_shape("key", key, (b, t, h, k), "b, t, h, k")
    _checks.check_shape("query", query, (b, t, h, k), "b, t, h, k")
    _checks.check_shape("value", value, (b, t, h, v), "b, t, h, v")
    if connector is not None and aggregation.gate == "position":
        wanted = (b, t, h, max(jnp.shape(connector)[-1:], default=0))
        _checks.check_shape("connector", connector, wanted, "b, t, h, distances")
    elif connector is not None:
        _checks.check_shape("connector", connector, (b, t, h, k), "b, t, h, k")
    elif aggregation.needs_connector:
        raise ValueError(
            f"{aggregation} makes its gates from a connector: pass connector, shape "
            f"(b, t, h, k) = {(b, t, h, k)} (the query may serve as one), or, for position gates, "
            "(b, t, h, distances)"
        )

    if document_ids is not None:
        _checks.check_documents(document_ids, (b, t))
        plan = segmentation.plan(t)
        if plan.spans_segments.any() and not plan.dyadic:
            raise ValueError(
                "document_ids need states that are of one segment each, or of 2^p blocks that "
                f"begin at a multiple of 2^p, got {segmentation}"
            )

    sizes = dict(b=b, t=t, h=h, k=k, v=v)
    optional = tuple(n for n, control in memory.controls.items() if control.optional)
    _checks.check_names(f"controls of {name}", controls, memory.controls, optional)
    for control, array in controls.items():
        axes = memory.controls[control].axes.split()
        _checks.check_shape(
            f"control {control}", array, tuple(sizes[a] for a in axes), ", ".join(axes)
        )

    if weights is not None:
        check_weights(memory, weights, h, k, v)


def check_weights(memory: Memory, weights: Mapping, heads: int, k: int, v: int) -> None:
    """Raises ValueError unless these are the initial weights of a memory, of every head."""
    shapes = memory.weight_shapes(k, v)
    _checks.check_names(f"weights of {type(memory).__name__}", weights, shapes)
    for weight, shape in shapes.items():
        _checks.check_shape(f"weight {weight}", weights[weight], (heads, *shape), "h, out, in")


def check_configuration(memory: Any, aggregation: Any, segmentation: Any) -> None:
    """Raises ValueError unless each is an instance, and the chunk size divides the segment's."""
    for what, got, wanted, example in (
        ("memory", memory, Memory, "mc.memories.Titans(chunk_size=64)"),
        ("aggregation", aggregation, Aggregation, "mc.GRM()"),
        ("segmentation", segmentation, Segmentation, "mc.Constant(256)"),
    ):
        if not isinstance(got, wanted):
            raise ValueError(f"{what} must be an object such as {example}, got {got!r}")
    if memory.gradient_chunk and segmentation.size % memory.gradient_chunk:
        raise ValueError(
            f"the chunk size of {type(memory).__name__}, {memory.gradient_chunk}, must divide the "
            f"segment size, got {segmentation}"
        )
