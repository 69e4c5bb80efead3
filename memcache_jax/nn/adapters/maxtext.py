"""MaxText's ``self_attention``, made of one of our layers."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from memcache_jax._typing import Array, Float
from memcache_jax.nn.config import Mixer


class MaxTextAttention(nnx.Module):
    """Takes the place of ``maxtext.layers.attentions.Attention`` in MaxText's decoder layers.

    It has that class's arguments and call, and a mixer instead of the attention. The
    ``decoder_segment_ids`` are the documents; a memory needs no rotary positions, so
    ``inputs_positions`` are not read. It trains and evaluates: MaxText's own decoding keeps keys
    and values, which a memory has not.

    Args:
      config: MaxText's; its ``emb_dim`` is the model dimension.
      num_query_heads: heads of the mixer.
      head_dim: dimension of a head.
      mixer: describes the layer.
      dtype: dtype of the arithmetic.
      weight_dtype: dtype of the parameters.
      model_mode: must be ``"train"``.
      rngs: random keys.
      attention: the host's other arguments, which only attention has, and which are not used.

    Raises:
      ValueError: for another ``model_mode``.

    Example:
      >>> import types, jax.numpy as jnp, memcache_jax as mc
      >>> from flax import nnx
      >>> layer = mc.nn.adapters.MaxTextAttention(
      ...     types.SimpleNamespace(emb_dim=64), num_query_heads=4, head_dim=16,
      ...     mixer=mc.nn.MemoryCachingMixer(), rngs=nnx.Rngs(0))
      >>> x = jnp.ones((2, 9, 64))
      >>> y, kv_cache = layer(x, x, decoder_segment_ids=jnp.ones((2, 9), int))
      >>> y.shape
      (2, 9, 64)
    """

    def __init__(
        self,
        config: Any,
        *,
        num_query_heads: int,
        head_dim: int,
        mixer: Mixer,
        dtype: DTypeLike = jnp.float32,
        weight_dtype: DTypeLike = jnp.float32,
        model_mode: str = "train",
        rngs: nnx.Rngs,
        **attention: Any,
    ) -> None:
        if model_mode != "train":
            raise ValueError(
                "MaxText decodes with a cache of keys and values, which a memory has not: "
                f"model_mode must be 'train', got {model_mode!r}"
            )
        sizes = dict(head_dim=head_dim, dtype=dtype, param_dtype=weight_dtype)
        self.mixer: Any = mixer.build(config.emb_dim, num_query_heads, **sizes, rngs=rngs)

    def __call__(
        self,
        inputs_q: Float[Array, "b t d"],
        inputs_kv: Any = None,
        inputs_positions: Any = None,
        decoder_segment_ids: Array | None = None,
        out_sharding: Any = None,
        *,
        kv_cache: Any = None,
        bidirectional_mask: Any = None,
        **options: Any,
    ) -> tuple[Float[Array, "b t d"], Any]:
        """Returns the output, and ``kv_cache`` as it came."""
        if bidirectional_mask is not None:
            raise ValueError("a memory is causal, it has no bidirectional_mask")
        documents = () if decoder_segment_ids is None else (decoder_segment_ids,)
        return self.mixer(inputs_q, *documents), kv_cache
