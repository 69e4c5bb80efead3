"""The attention of Flax's Gemma example, made of one of our layers."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from memcache_jax._typing import Array, Float
from memcache_jax.nn.adapters._cache import HostCache, empty, extend
from memcache_jax.nn.config import Mixer


class GemmaAttention(nnx.Module):
    """Takes the place of ``modules.Attention`` in Flax's ``examples/gemma``.

    It has that class's arguments, call and ``init_cache``. The mask decides which tokens form a
    document and which are padding; a memory needs no rotary positions, so ``segment_pos`` is not
    read.

    Args:
      num_heads: heads.
      num_kv_heads: not used: a memory has as many keys as queries.
      features: model dimension.
      head_dim: dimension of a head.
      attention: arguments that only attention has, not used; ``options`` too.
      mixer: describes the layer.
      dtype: dtype of the arithmetic.
      weight_dtype: dtype of the parameters.
      shd_config: names the mesh's axes over which parameters are divided.
      rngs: random keys.

    Example:
      >>> import jax.numpy as jnp, memcache_jax as mc
      >>> from flax import nnx
      >>> layer = mc.nn.adapters.GemmaAttention(
      ...     4, 1, 64, 16, mixer=mc.nn.MemoryCachingMixer(), rngs=nnx.Rngs(0))
      >>> mask = jnp.tril(jnp.ones((2, 9, 9), bool))
      >>> layer(jnp.ones((2, 9, 64)), jnp.arange(9)[None], None, mask)[1].shape
      (2, 9, 64)
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        features: int,
        head_dim: int,
        *attention: Any,
        mixer: Mixer,
        dtype: DTypeLike = jnp.float32,
        weight_dtype: DTypeLike = jnp.float32,
        shd_config: Any = None,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        layout: dict[str, Any] = dict(head_dim=head_dim, dtype=dtype, param_dtype=weight_dtype)
        if getattr(shd_config, "q_weight_ndh", None) is not None:
            axes = shd_config.fsdp_axis_name, shd_config.tensor_parallel_axis_name
            layout["axis_names"] = dict(zip(("embed", "heads"), axes, strict=True))
        self.mixer: Any = mixer.build(features, num_heads, **layout, rngs=rngs)

    def init_cache(self, cache_size: int, batch_size: int, dtype: Any = jnp.float32) -> HostCache:
        """Returns an empty cache for ``cache_size`` tokens a row, whose states are of ``dtype``."""
        return empty(self.mixer.init_cache(batch_size, cache_size, cache_dtype=dtype), batch_size)

    def __call__(
        self, x: Array, segment_pos: Any, cache: Any, attn_mask: Any, rngs: Any = None
    ) -> tuple[HostCache | None, Float[Array, "b t d"]]:
        """Returns the cache after these tokens, None without one, and the output.

        Raises:
          ValueError: for a mask that a memory cannot follow, see ``ModelCall``; where it is traced,
            tokens or rows of it give NaN.
        """
        if cache is None:
            return None, self.mixer(x, mask=attn_mask)
        y, cache = extend(self.mixer, x, cache, attn_mask)
        return cache, y
