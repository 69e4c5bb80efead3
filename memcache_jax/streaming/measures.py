"""Measures by which the segments of a stream end, for borders by errors and scores."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from memcache_jax._typing import Array, Bool
from memcache_jax.engine.measures import errors_of_chunk
from memcache_jax.engine.types import Rows, Tokens, Writing
from memcache_jax.streaming.slots import Decided


def measured(
    cache: Any, how: Writing, tokens: Tokens, rows: Rows, counted: Bool[Array, "b *m"]
) -> Any:
    """The record with the measures of more tokens (b, h, 1, m, ...), by errors or scores."""
    slots = cache.config.slots
    if not isinstance(slots, Decided) or slots.segmentation.by == "keys":
        return cache.record
    if slots.segmentation.by == "scores":
        measures = tokens.border[:, :, 0].mean(axis=1)
    else:
        of_chunk: Any = functools.partial(errors_of_chunk, how)
        states = cache.state, cache.state if cache.anchor is None else cache.anchor
        states = jax.tree.map(lambda x: x[:, :, 0], states)
        chunk = jax.tree.map(lambda x: x[:, :, 0, 0], rows._replace(bad=None))
        args = *states, cache.initial, chunk
        _, errors = jax.vmap(jax.vmap(of_chunk, (0, 0, 0, 0)), (0, 0, None, 0))(*args)
        assert rows.bad is not None
        measures = jnp.where(rows.bad[:, :, 0, 0], jnp.nan, errors).mean(axis=1)
    measures = jnp.where(counted, measures, 0)
    return slots.measured(cache.record, lax.stop_gradient(measures))
