"""The layer for Linen models."""

from typing import Any

from flax import linen, nnx

from memcache_jax.nn import memory_caching


def MemoryCaching(*args: Any, **kwargs: Any) -> linen.Module:  # noqa: N802 (a module's name)
    """Returns ``nn.MemoryCaching`` as a Linen module, with ``init`` and ``apply``.

    Takes the arguments of ``nn.MemoryCaching`` except ``rngs``, and ``name`` as Linen modules do.

    Example:
      >>> import jax, jax.numpy as jnp, memcache_jax as mc
      >>> layer = mc.nn.linen.MemoryCaching(64, 4, memory=mc.memories.LinearAttention(),
      ...                                   aggregation=mc.GRM(), segmentation=mc.Constant(64))
      >>> x = jnp.ones((2, 100, 64))
      >>> layer.apply(layer.init(jax.random.key(0), x), x).shape
      (2, 100, 64)
    """
    # Plain arrays, not boxed with the names of their axes.
    return nnx.bridge.to_linen(memory_caching.MemoryCaching, *args, metadata_fn=None, **kwargs)
