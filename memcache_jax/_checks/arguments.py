"""Checks of what calls and layers get: arrays of the right shapes, and values that fit them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from memcache_jax._checks.values import (
    LARGEST,
    as_numpy,
    check_array,
    check_integer,
    check_names,
    check_shape,
    check_sizes,
    is_known,
)


def check_heads(in_features: Any, num_heads: Any, head_dim: Any) -> int:
    """Returns the dimension of a head, or raises ValueError."""
    in_features, num_heads = check_sizes(in_features=in_features, num_heads=num_heads)
    head_dim = check_integer("head_dim", head_dim, optional=True)
    if head_dim is None and in_features % num_heads:
        raise ValueError(
            f"num_heads={num_heads} must divide in_features={in_features}, or give head_dim"
        )
    return in_features // num_heads if head_dim is None else head_dim


def check_input(x: Any, in_features: int) -> None:
    """Raises ValueError unless ``x`` is (b, t, in_features)."""
    shape, _ = check_array("the input", x)
    if len(shape) != 3 or shape[-1] != in_features:
        raise ValueError(
            f"the input must be (b, t, d) with d = in_features = {in_features}, got shape {shape}"
        )


def check_tokens(tokens: Any, vocab_size: int, lengths: Any = None, name: str = "tokens") -> None:
    """Raises ValueError unless ``tokens`` are (b, t) ids below ``vocab_size``, where known.

    With ``lengths`` (b,), only that many of each row count: padding may hold any integer.
    """
    shape, dtype = check_array(name, tokens)
    if len(shape) != 2 or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"{name} must be integers of shape (b, t), got {dtype} {shape}")
    if is_known(tokens) and (lengths is None or is_known(lengths)):
        known = np.asarray(tokens)
        if lengths is not None:
            counts = np.asarray(check_lengths(lengths, shape))
            known = known[np.arange(shape[1]) < counts[:, None]]
        if known.size:
            check_ids(name, int(known.min()), int(known.max()), vocab_size)


def without_padding(tokens: jax.Array, lengths: Any) -> jax.Array:
    """Returns tokens (b, t) with zeros, valid ids, in place of those beyond ``lengths`` (b,)."""
    return jnp.where(jnp.arange(tokens.shape[1])[None] < jnp.asarray(lengths)[:, None], tokens, 0)


def check_ids(name: str, smallest: int, largest: int, vocab_size: int) -> None:
    """Raises ValueError for token ids below 0 or outside the vocabulary."""
    if smallest < 0 or largest >= vocab_size:
        raise ValueError(
            f"{name} must hold token ids from 0 to {vocab_size - 1}, "
            f"got {smallest if smallest < 0 else largest}"
        )


def check_documents(document_ids: Any, wanted: tuple[int, ...], name: str = "document_ids") -> None:
    """Raises ValueError unless ``document_ids`` are integers of shape (b, t)."""
    shape, dtype = check_array(name, document_ids)
    if shape != wanted or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"{name} must be integers of shape (b, t) = {wanted}, got {dtype} {shape}")


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
        known = as_numpy("rows", rows)
        if known.ndim != 1 or not np.issubdtype(known.dtype, np.integer):
            raise ValueError(f"rows must be integers (n,), got {known.dtype} {known.shape}")
        if known.size and (known.min() < 0 or known.max() >= batch):
            raise ValueError(f"the cache has the rows 0 to {batch - 1}, got {known.tolist()}")
    return jnp.asarray(rows)


def check_marks(rows: Any, batch: int) -> jax.Array:
    """Returns a mask of rows, or raises ValueError unless it is booleans (b,)."""
    marks = rows if isinstance(rows, Tracer) else as_numpy("rows", rows)
    if marks.shape != (batch,) or marks.dtype != bool:
        raise ValueError(
            f"rows to reset are marked by booleans (b,) = ({batch},), got {marks.dtype} "
            f"{marks.shape}"
        )
    return jnp.asarray(rows)


def check_lengths(lengths: Any, shape: tuple[int, ...], least: int = 0) -> Any:
    """Returns how many tokens of each row (b, t) count, an array, or raises ValueError.

    Each is ``least`` to t; None is t. Traced values are not checked.
    """
    batch, count = shape
    if lengths is None:
        return np.full(batch, count, np.int32)
    lengths = lengths if isinstance(lengths, Tracer) else as_numpy("lengths", lengths)
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"lengths must be integers (b,) = ({batch},), got {lengths.dtype} {lengths.shape}"
        )
    if not isinstance(lengths, Tracer) and (lengths.min() < least or lengths.max() > count):
        raise ValueError(
            f"lengths must be {least} to {count}, the tokens given, got {lengths.tolist()}"
        )
    return lengths


def check_rewind(tokens: Any, rewindable: Any, batch: int) -> jax.Array:
    """Returns how many tokens each row goes back by, or raises ValueError.

    ``rewindable`` are the most, (b,); None of a cache that does not go back. Traced values are not
    checked.
    """
    if rewindable is None:
        raise ValueError(
            "the cache does not go back: make it with init_cache(..., rewind=most tokens)"
        )
    known = tokens if isinstance(tokens, Tracer) else as_numpy("tokens to take back", tokens)
    if known.shape not in ((), (batch,)) or not jnp.issubdtype(known.dtype, jnp.integer):
        raise ValueError(
            f"tokens to take back must be integers (b,) = ({batch},), or one for all rows, got "
            f"{known.dtype} {known.shape}"
        )
    known = (jnp if isinstance(known, Tracer) else np).broadcast_to(known, (batch,))
    if not isinstance(known, Tracer) and is_known(rewindable):
        most = np.asarray(rewindable)
        if np.any(known < 0) or np.any(known > most):
            raise ValueError(
                f"rows can go back by at most {most.tolist()} tokens, got {known.tolist()}: "
                "init_cache(..., rewind=) keeps more"
            )
    return jnp.asarray(known, jnp.int32)


def check_room(
    position: jax.Array | np.ndarray,
    shape: tuple[int, ...],
    lengths: Any,
    max_length: int | None,
) -> None:
    """Raises ValueError unless tokens (b, t) continue the rows at ``position``, and have room.

    ``lengths`` of them count in each row; None for all. Traced values are not checked. Without a
    ``max_length`` there is room for ``LARGEST``.
    """
    batch, count = shape
    if position.shape != (batch,):
        raise ValueError(f"the cache has {position.shape[0]} rows, got tokens of {batch}")
    if not count:
        raise ValueError("give at least one token, got none")
    lengths = check_lengths(lengths, shape)
    if isinstance(lengths, Tracer) or not is_known(position):
        return
    most = int((np.asarray(position, np.int64) + lengths).max())
    if max_length is None and most > LARGEST:
        raise ValueError(
            f"a row of a stream takes at most {LARGEST} tokens and would have {most}: reset "
            "the row, or begin another cache"
        )
    if max_length is not None and most > max_length:
        raise ValueError(
            f"the cache holds {max_length} tokens in a row and would have {most}: init_cache makes "
            "more room with a larger max_length or max_segments, or a policy"
        )


def advanced(position: jax.Array, taken: Any) -> jax.Array:
    """Positions after more tokens. They stop at ``LARGEST``, before int32 would overflow."""
    taken = jnp.minimum(taken, LARGEST - position).astype(position.dtype)
    return position + taken


def check_arguments(
    query: Any,
    key: Any,
    value: Any,
    connector: Any,
    memory: Any,
    controls: Mapping,
    weights: Mapping | None,
    aggregation: Any,
    segmentation: Any,
    document_ids: Any,
) -> None:
    """Raises ValueError unless the arrays of ``memory_caching`` fit each other and the rule.

    Weights that are None have been checked before.
    """
    (of_key, _), (of_value, _) = check_array("key", key), check_array("value", value)
    if len(of_key) != 4 or len(of_value) != 4:
        raise ValueError(
            f"key must be (b, t, h, k) and value (b, t, h, v), got key {of_key}, value {of_value}"
        )
    (b, t, h, k), v = of_key, of_value[-1]
    for name, shape, axes in (("key", of_key, "k"), ("value", of_value, "v")):
        if 0 in shape:
            raise ValueError(f"{name} must not be empty, got shape (b, t, h, {axes}) = {shape}")
    check_shape("key", key, (b, t, h, k), "b, t, h, k")
    of_query, _ = check_array("query", query)
    if of_query != of_key:
        raise ValueError(
            "query and key must have the same shape (b, t, h, k), got query "
            f"{of_query}, key {of_key}"
        )
    check_shape("query", query, (b, t, h, k), "b, t, h, k")
    check_shape("value", value, (b, t, h, v), "b, t, h, v")
    if connector is not None and aggregation.relevance.connector == "distances":
        of_connector, _ = check_array("connector", connector)
        wanted = (b, t, h, max(1, *of_connector[-1:]))
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
    check_names(f"controls of {type(memory).__name__}", controls, memory.controls, optional)
    for control, array in controls.items():
        axes = memory.controls[control].axes.split()
        check_shape(f"control {control}", array, tuple(sizes[a] for a in axes), ", ".join(axes))
        most = memory.controls[control].most
        # Of others the host would have to wait for the device.
        if most is not None and isinstance(array, np.ndarray) and np.any(array > most):
            raise ValueError(f"control {control} must be at most {most:g}, got {array.max():g}")

    if weights is not None:
        check_weights(memory, weights, h, k, v)


def check_border(border: Any, segmentation: Any, key: Any) -> None:
    """Raises ValueError unless ``border`` has logits (b, t, h) exactly where segments need them."""
    shape = tuple(key.shape[:3])
    wanted = getattr(segmentation, "by", None) == "scores"
    if wanted and border is None:
        raise ValueError(
            f"{segmentation} decides by scores: pass border, logits (b, t, h) = {shape}, got None; "
            "layers built with such segments compute it"
        )
    if border is not None:
        if not wanted:
            raise ValueError(f"border is for Adaptive(by='scores'), got {segmentation}")
        check_shape("border", border, shape, "b, t, h")


def check_weights(memory: Any, weights: Mapping, heads: int, k: int, v: int) -> None:
    """Raises ValueError unless these are the initial weights of a memory, of every head."""
    shapes = memory.weight_shapes(k, v)
    check_names(f"weights of {type(memory).__name__}", weights, shapes)
    for weight, shape in shapes.items():
        check_shape(f"weight {weight}", weights[weight], (heads, *shape), "h, out, in")
