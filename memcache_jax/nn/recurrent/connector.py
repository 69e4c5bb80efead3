"""What the content gates of a composed layer compare with pooled keys."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from memcache_jax._typing import Array, Float
from memcache_jax.nn.layers import Linear, copy_of, l2_normalize
from memcache_jax.nn.recurrent.path import Rows
from memcache_jax.sharding.names import partitioned

SHARPNESS = 10.0
"""The temperature that ``mc.nn.MemoryCaching`` starts with."""


def make_connector(
    query: Rows, heads: int, matched: bool, in_features: int, **options: Any
) -> tuple[Linear, nnx.Param]:
    """W_u, and a temperature for each head.

    A copy of W_q and 10, if ``matched``; else zeros, so that gates are uniform before training.
    """
    zeros = jax.nn.initializers.zeros
    init = copy_of(query.linear.kernel) if matched else zeros
    inner = heads * query.path.dim
    linear = Linear(in_features, inner, axes=("embed", "heads"), kernel_init=init, **options)
    start = jax.nn.initializers.constant(SHARPNESS) if matched else zeros
    temperature = partitioned(start, "heads")
    shape, dtype = (heads,), options["param_dtype"]
    return linear, nnx.Param(temperature(options["rngs"].params(), shape, dtype))


def connect(
    rows: Float[Array, "b t h k"],
    query: Float[Array, "b t h k"],
    temperature: Float[Array, "h"],
    matched: bool,
) -> Float[Array, "b t h k"]:
    """The connector: temperature W_u x / |W_u x| if ``matched``, else W_u x + temperature q/|q|."""
    factor = temperature.astype(query.dtype)[None, None, :, None]
    return factor * l2_normalize(rows) if matched else rows + factor * l2_normalize(query)


def match(key: Rows, query: Rows) -> None:
    """Lets keys start as copies of queries: their projections, and their convolutions."""
    key.linear.kernel[...] = jnp.array(query.linear.kernel[...])
    if query.path.conv_width:
        key.conv.kernel[...] = jnp.array(query.conv.kernel[...])
