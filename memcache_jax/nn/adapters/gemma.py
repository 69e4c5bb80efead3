"""The attention of Flax's Gemma example, made of one of our layers."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from memcache_jax._typing import Array, Float, Int
from memcache_jax.nn.adapters._masks import checked, read_mask, read_next, shift
from memcache_jax.nn.config import Mixer


class GemmaCache(NamedTuple):
    """A stream's past in one layer: the mixer's cache, and each row's tokens so far."""

    past: Any
    position: Int[Array, "b"]  # without padding
    end_index: Int[Array, "b"]  # with padding, the same for all rows


class GemmaAttention(nnx.Module):
    """Takes the place of ``modules.Attention`` in ``examples/gemma`` of Flax.

    It has that class's arguments, call and ``init_cache``, and a mixer instead of the attention.
    The mask decides which tokens form a document and which are padding; a memory needs no rotary
    positions, so ``segment_pos`` is not read.

    Args:
      num_heads: heads of the mixer.
      num_kv_heads: not used, as are the arguments that only attention has: a memory has as many
        keys as queries.
      features: model dimension.
      head_dim: dimension of a head.
      mixer: describes the layer.
      dtype: dtype of the arithmetic.
      weight_dtype: dtype of the parameters.
      rngs: random keys.
      attention: further arguments of the host, not used.
      options: likewise.

    Example:
      >>> import jax.numpy as jnp, memcache_jax as mc
      >>> from flax import nnx
      >>> layer = mc.nn.adapters.GemmaAttention(4, 1, 64, 16, mixer=mc.nn.MemoryCachingMixer(),
      ...                                       rngs=nnx.Rngs(0))
      >>> mask = jnp.tril(jnp.ones((2, 9, 9), bool))
      >>> cache, y = layer(jnp.ones((2, 9, 64)), jnp.arange(9)[None], None, mask)
      >>> y.shape
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
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        sizes = dict(head_dim=head_dim, dtype=dtype, param_dtype=weight_dtype)
        self.mixer: Any = mixer.build(features, num_heads, **sizes, rngs=rngs)

    def init_cache(
        self, cache_size: int, batch_size: int, dtype: DTypeLike = jnp.float32
    ) -> GemmaCache:
        """Returns an empty cache for ``cache_size`` tokens a row, whose states are of ``dtype``."""
        past = self.mixer.init_cache(batch_size, cache_size, cache_dtype=dtype)
        # Two arrays, so that they can be donated.
        return GemmaCache(past, *(jnp.zeros(batch_size, jnp.int32) for _ in range(2)))

    def __call__(
        self,
        x: Float[Array, "b t d"],
        segment_pos: Any,
        cache: GemmaCache | None,
        attn_mask: Array,
        rngs: Any = None,
    ) -> tuple[GemmaCache | None, Float[Array, "b t d"]]:
        """Returns the cache after these tokens, None without one, and the output.

        Raises:
          ValueError: for a mask that a memory does not honour: see ``docs/hosts.md``. Under a
            trace, tokens with such a mask give NaN.
        """
        if cache is None:
            rows = read_mask(attn_mask)
            return None, checked(rows.honoured, self.mixer(x, rows.first))
        past, position, end = cache
        padding, lengths, honoured = read_next(attn_mask, end[0], position)
        y, past = self.mixer.extend(shift(x, padding), past, lengths)
        y = checked(honoured, shift(y, -padding))
        return GemmaCache(past, position + lengths, end + x.shape[1]), y
