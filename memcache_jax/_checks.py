"""Checks of arguments, made before anything is traced."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

MOST_TOKENS = 2**31 - 1
"""Most tokens of a stream's row: positions are int32."""


def check_choice(name: str, got: Any, choices: tuple) -> None:
    """Raises ValueError unless ``got`` is one of ``choices``."""
    if got not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {got!r}")


def check_sizes(**sizes: int | None) -> None:
    """Raises ValueError for a size below 1, or beyond int32."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
        if size is not None and size > MOST_TOKENS:
            raise ValueError(f"{name} must be at most {MOST_TOKENS}, got {size}")


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


def check_heads(in_features: int, num_heads: int, head_dim: int | None) -> int:
    """Returns the dimension of a head, or raises ValueError."""
    check_sizes(in_features=in_features, num_heads=num_heads, head_dim=head_dim)
    if head_dim is None and in_features % num_heads:
        raise ValueError(
            f"num_heads={num_heads} must divide in_features={in_features}, or give head_dim"
        )
    return in_features // num_heads if head_dim is None else head_dim


def check_input(x: jax.Array, in_features: int) -> None:
    """Raises ValueError unless ``x`` is (b, t, in_features)."""
    if x.ndim != 3 or x.shape[-1] != in_features:
        raise ValueError(
            f"the input must be (b, t, d) with d = in_features = {in_features}, got shape {x.shape}"
        )


def check_documents(
    document_ids: jax.typing.ArrayLike, wanted: tuple[int, ...], name: str = "document_ids"
) -> None:
    """Raises ValueError unless ``document_ids`` are integers of shape (b, t)."""
    if jnp.shape(document_ids) != wanted or not jnp.issubdtype(
        jnp.result_type(document_ids), jnp.integer
    ):
        raise ValueError(
            f"{name} must be integers of shape (b, t) = {wanted}, got "
            f"{jnp.result_type(document_ids)} {jnp.shape(document_ids)}"
        )


def check_cache(cache: Any, kind: type, wanted: tuple[int, int]) -> None:
    """Raises ValueError unless a cache is of this kind, for (heads, their dimension) as wanted."""
    if not isinstance(cache, kind):
        raise ValueError(f"the cache was made for another layer: {type(cache).__name__}")
    if cache.head_shape != wanted:
        raise ValueError(
            f"the cache was made for (num_heads, head_dim) = {cache.head_shape}, this layer has "
            f"{wanted}"
        )


def check_rows(rows: Any, batch: int) -> jax.Array:
    """Returns the numbers of rows, or raises ValueError for others than 0 to batch - 1."""
    if not isinstance(rows, Tracer):
        known = np.asarray(rows)
        if known.ndim != 1 or not np.issubdtype(known.dtype, np.integer):
            raise ValueError(f"rows must be integers (n,), got {known.dtype} {known.shape}")
        if known.size and (known.min() < 0 or known.max() >= batch):
            raise ValueError(f"the cache has the rows 0 to {batch - 1}, got {known.tolist()}")
    return jnp.asarray(rows)


def check_lengths(lengths: Any, shape: tuple[int, ...], least: int = 0) -> Any:
    """Returns how many tokens of each row (b, t) count, an array, or raises ValueError.

    Each is ``least`` to t; None is t. Traced values are not checked.
    """
    batch, count = shape
    if lengths is None:
        return np.full(batch, count, np.int32)
    lengths = lengths if isinstance(lengths, Tracer) else np.asarray(lengths)
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"lengths must be integers (b,) = ({batch},), got {lengths.dtype} {lengths.shape}"
        )
    if not isinstance(lengths, Tracer) and (lengths.min() < least or lengths.max() > count):
        raise ValueError(
            f"lengths must be {least} to {count}, the tokens given, got {lengths.tolist()}"
        )
    return lengths


def check_room(
    position: jax.Array, shape: tuple[int, ...], lengths: Any, max_length: int | None
) -> None:
    """Raises ValueError unless tokens (b, t) continue the rows at ``position``, and have room.

    ``lengths`` of them count in each row; None for all. Traced values are not checked. Without a
    ``max_length`` there is room for ``MOST_TOKENS``.
    """
    batch, count = shape
    if position.shape != (batch,):
        raise ValueError(f"the cache has {position.shape[0]} rows, got tokens of {batch}")
    if not count:
        raise ValueError("give at least one token, got none")
    lengths = check_lengths(lengths, shape)
    if isinstance(lengths, Tracer) or isinstance(position, Tracer):
        return
    most = int((np.asarray(position, np.int64) + lengths).max())
    if max_length is None and most > MOST_TOKENS:
        raise ValueError(
            f"a row of a stream takes at most {MOST_TOKENS} tokens and would have {most}: reset "
            "the row, or begin another cache"
        )
    if max_length is not None and most > max_length:
        raise ValueError(
            f"the cache holds {max_length} tokens in a row and would have {most}: init_cache makes "
            "more room with a larger max_length or max_segments, or a policy"
        )


def advanced(position: jax.Array, taken: Any) -> jax.Array:
    """Positions after more tokens. They stop at ``MOST_TOKENS``, before int32 would overflow."""
    taken = jnp.minimum(taken, MOST_TOKENS - position).astype(position.dtype)
    return position + taken


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
    """Raises ValueError unless the arrays of ``memory_caching`` fit each other and the rule.

    Weights that are None have been checked before.
    """
    name = type(memory).__name__
    if jnp.ndim(key) != 4 or jnp.ndim(value) != 4:
        raise ValueError(
            "key must be (b, t, h, k) and value (b, t, h, v), got "
            f"key {jnp.shape(key)}, value {jnp.shape(value)}"
        )
    b, t, h, k = jnp.shape(key)
    v = jnp.shape(value)[-1]
    if 0 in jnp.shape(key):
        raise ValueError(f"key must not be empty, got shape (b, t, h, k) = {jnp.shape(key)}")
    check_shape("key", key, (b, t, h, k), "b, t, h, k")
    check_shape("query", query, (b, t, h, k), "b, t, h, k")
    check_shape("value", value, (b, t, h, v), "b, t, h, v")
    if connector is not None and aggregation.relevance.connector == "distances":
        wanted = (b, t, h, max(jnp.shape(connector)[-1:], default=0))
        check_shape("connector", connector, wanted, "b, t, h, distances")
    elif connector is not None:
        check_shape("connector", connector, (b, t, h, k), "b, t, h, k")
    elif aggregation.needs_connector:
        raise ValueError(
            f"{aggregation} makes its gates from a connector: pass connector, shape "
            f"(b, t, h, k) = {(b, t, h, k)} (the query may serve as one), or, for position gates, "
            "(b, t, h, distances)"
        )

    if document_ids is not None:
        check_documents(document_ids, (b, t))
        plan = segmentation.plan(t)
        if plan.spans_segments.any() and not plan.dyadic:
            raise ValueError(
                "document_ids need buckets of one segment each, or of 2^p blocks that "
                f"begin at a multiple of 2^p, got {segmentation}"
            )

    sizes = dict(b=b, t=t, h=h, k=k, v=v)
    optional = tuple(n for n, control in memory.controls.items() if control.optional)
    check_names(f"controls of {name}", controls, memory.controls, optional)
    for control, array in controls.items():
        axes = memory.controls[control].axes.split()
        check_shape(f"control {control}", array, tuple(sizes[a] for a in axes), ", ".join(axes))

    if weights is not None:
        check_weights(memory, weights, h, k, v)


def check_weights(memory: Any, weights: Mapping, heads: int, k: int, v: int) -> None:
    """Raises ValueError unless these are the initial weights of a memory, of every head."""
    shapes = memory.weight_shapes(k, v)
    check_names(f"weights of {type(memory).__name__}", weights, shapes)
    for weight, shape in shapes.items():
        check_shape(f"weight {weight}", weights[weight], (heads, *shape), "h, out, in")
