"""Logits of borders, which layers learn for ``Adaptive(by="scores")``."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from memcache_jax._typing import Array, Float
from memcache_jax.adaptive import Adaptive
from memcache_jax.nn.layers import SMALL, Linear


def learn_borders(layer: Any, rngs: nnx.Rngs) -> None:
    """Gives a ``MemoryLayer`` a linear map to logits, ``border``, if its segments need them."""
    if isinstance(layer.segmentation, Adaptive) and layer.segmentation.by == "scores":
        layer.border = Linear(
            layer.in_features,
            layer.num_heads,
            axes=("embed", "heads"),
            use_bias=True,
            kernel_init=SMALL,
            bias_init=jax.nn.initializers.constant(-1.0),  # see ``Adaptive``
            dtype=layer.dtype,
            param_dtype=layer.param_dtype,
            rngs=rngs,
        )


def with_border(layer: Any, tokens: dict[str, Any], x: Float[Array, "b t d"]) -> dict[str, Any]:
    """A layer's per-token arguments, with logits of borders in float32 or wider if it has them."""
    if not hasattr(layer, "border"):
        return tokens
    logits = layer.border(x)
    return tokens | {"border": logits.astype(jnp.promote_types(logits.dtype, jnp.float32))}
