"""The layers for Linen models."""

import dataclasses
from typing import Literal

from jax.typing import DTypeLike

from memcache_jax._typing import Exchange, Implementation, Start
from memcache_jax.aggregation import Aggregation
from memcache_jax.memories import Memory
from memcache_jax.nn import attention, memory_caching
from memcache_jax.nn.bridge import LinenMixer
from memcache_jax.segmentation import Segmentation
from memcache_jax.streaming.eviction import Eviction
from memcache_jax.streaming.storage import Placement


class MemoryCaching(LinenMixer):
    """``nn.MemoryCaching`` as a Linen module.

    Its parameters have the names and the initial values of the NNX layer's, and carry its logical
    axes as ``nn.with_logical_partitioning`` does: ``embed`` and ``heads``. Variables may be boxed
    or not.

    With ``decode=True`` it keeps a stream in the collection ``cache``, as Flax's own attention
    does: ``init`` makes it empty, each ``apply(..., mutable=["cache"])`` takes the next tokens, any
    number of them. Calls read the cache's options from the module's fields.

    Args:
      in_features: model dimension d; the input's by default.
      num_heads: heads h.
      memory: as in ``nn.MemoryCaching``, like all that are not named here.
      decode: whether to continue the stream of a cache.
      max_length: most tokens per row of a cache; by default as many as ``init`` is given, or any
        number if ``max_segments`` is given.
      max_segments: as in ``mc.init_cache``, like the next four.
      policy: what happens when a segment ends while ``max_segments`` are cached.
      cache_dtype: dtype of cached states.
      placement: where they are kept.
      rewind: by how many tokens ``take_back`` takes a row back.
      name: as for any Linen module.

    Example:
      >>> import jax, jax.numpy as jnp, memcache_jax as mc
      >>> layer = mc.nn.linen.MemoryCaching(64, 4, memory=mc.memories.LinearAttention(),
      ...                                   aggregation=mc.GRM(), segmentation=mc.Constant(64))
      >>> x = jnp.ones((2, 100, 64))
      >>> variables = layer.init(jax.random.key(0), x)
      >>> y = layer.apply(variables, x)
      >>> stream = layer.clone(decode=True)
      >>> variables = {**variables, "cache": stream.init_cache(2, max_length=100)}
      >>> start, changed = stream.apply(variables, x[:, :99], mutable=["cache"])
      >>> last, changed = stream.apply({**variables, **changed}, x[:, 99:], mutable=["cache"])
      >>> bool(abs(last - y[:, 99:]).max() < 1e-5)
      True
    """

    _: dataclasses.KW_ONLY
    memory: Memory
    aggregation: Aggregation
    segmentation: Segmentation
    start: Start = "independent"
    connector: Literal["learned", "query"] = "learned"
    distances: int = 64
    conv_width: int = 4
    bounded: bool = True
    implementation: Implementation | None = None
    exchange: Exchange = "gather"
    max_segments: int | None = None
    policy: str | Eviction = "error"
    cache_dtype: DTypeLike | None = None
    placement: Placement = "device"
    rewind: int = 0

    nnx_class = memory_caching.MemoryCaching
    cache_options = ("max_segments", "policy", "cache_dtype", "placement", "rewind")

    @property
    def _bounded(self) -> bool:
        return self.max_length is not None or self.max_segments is not None


class Attention(LinenMixer):
    """``nn.Attention`` as a Linen module; parameters and ``decode`` as of ``MemoryCaching``.

    Args:
      in_features: model dimension d; the input's by default.
      num_heads: heads h.
      window: as in ``nn.Attention``, like all that are not named here.
      decode: whether to continue the stream of a cache.
      max_length: most tokens per row of a cache without a window; by default as many as ``init`` is
        given.
      rewind: by how many tokens ``take_back`` takes a row back.
      name: as for any Linen module.

    Example:
      >>> import jax, jax.numpy as jnp, memcache_jax as mc
      >>> layer = mc.nn.linen.Attention(num_heads=4, window=32)
      >>> x = jnp.ones((2, 100, 64))
      >>> layer.apply(layer.init(jax.random.key(0), x), x).shape
      (2, 100, 64)
    """

    _: dataclasses.KW_ONLY
    window: int | None = None
    rope_base: float = 10_000.0
    implementation: Literal["xla", "cudnn"] | None = None
    rewind: int = 0

    nnx_class = attention.Attention
    cache_options = ("rewind",)

    @property
    def _bounded(self) -> bool:
        return self.max_length is not None or self.window is not None
