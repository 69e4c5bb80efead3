"""Sequences given to a cache piece by piece."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

import memcache_jax as mc
from tests.cases import scheduled


def over_time(inputs, memory, change):
    """The tokens of inputs, changed; constants of a head as they are."""
    fixed = {name for name, control in memory.controls.items() if control.axes == "h"}

    def leaf(path, x):
        return x if path[-1].key in fixed else change(x)

    tokens = {name: x for name, x in inputs.items() if name != "weights"}
    return jax.tree_util.tree_map_with_path(leaf, tokens)


def empty(
    inputs, memory, aggregation, segmentation, start: Any = "independent", segments=None, **options
):
    """The cache of a stream before its first token, with room for all of it."""
    batch, length, heads, key_dim = inputs["key"].shape
    if segments is None:
        segments = -(-length // segmentation.size) - 1
    return mc.init_cache(
        batch,
        heads,
        key_dim,
        inputs["value"].shape[-1],
        memory=memory,
        weights=inputs["weights"],
        aggregation=aggregation,
        segmentation=segmentation,
        start=start,
        max_segments=segments,
        dtype=inputs["key"].dtype,
        **options,
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4), static_argnames="split")
def streamed(
    inputs,
    memory,
    aggregation,
    segmentation,
    start="independent",
    split: Any = (3, 33, 1),
):
    """The outputs of calls with so many tokens each."""
    cache, outputs, begin = empty(inputs, memory, aggregation, segmentation, start), [], 0
    with scheduled("in_turn"):
        for count in split:
            part = over_time(inputs, memory, lambda x, b=begin, c=count: x[:, b : b + c])
            y, cache = mc.extend(cache, **part)
            outputs.append(y)
            begin += count
    return jnp.concatenate(outputs, axis=1)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def whole(inputs, memory, aggregation, segmentation, start: Any = "independent"):
    with scheduled("in_turn"):
        return mc.memory_caching(
            **inputs, memory=memory, aggregation=aggregation, segmentation=segmentation, start=start
        )
