"""MaxText's ``self_attention``, made of one of our layers."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from memcache_jax._typing import Array, Float
from memcache_jax.nn.config import Mixer


class MaxTextAttention(nnx.Module):
    """Takes the place of ``maxtext.layers.attentions.Attention`` in MaxText's decoder layers.

    It has that class's arguments and call. ``decoder_segment_ids`` are the documents; a memory
    needs no rotary positions, so ``inputs_positions`` are not read. It trains and evaluates:
    MaxText's own decoding keeps keys and values, which a memory has not.

    Args:
      config: MaxText's; its ``emb_dim`` is the model dimension.
      num_query_heads: heads.
      head_dim: dimension of a head.
      mixer: describes the layer.
      dtype: dtype of the arithmetic.
      weight_dtype: dtype of the parameters.
      model_mode: must be ``"train"``.
      rngs: random keys.
      attention: arguments that only attention has, not used.

    Raises:
      ValueError: for another ``model_mode``.

    Example:
      >>> import types, jax.numpy as jnp, memcache_jax as mc
      >>> from flax import nnx
      >>> layer = mc.nn.adapters.MaxTextAttention(
      ...     types.SimpleNamespace(emb_dim=64), num_query_heads=4, head_dim=16,
      ...     mixer=mc.nn.MemoryCachingMixer(), rngs=nnx.Rngs(0))
      >>> x = jnp.ones((2, 9, 64))
      >>> layer(x, x, decoder_segment_ids=jnp.ones((2, 9), int))[0].shape
      (2, 9, 64)
    """

    def __init__(
        self,
        config: Any,
        num_query_heads: int,
        *,
        head_dim: int,
        mixer: Mixer,
        dtype: DTypeLike = jnp.float32,
        weight_dtype: DTypeLike = jnp.float32,
        model_mode: str = "train",
        rngs: nnx.Rngs,
        **attention: Any,
    ) -> None:
        if model_mode != "train":
            raise ValueError(f"a memory has no keys to decode from: model_mode={model_mode!r}")
        sizes = dict(head_dim=head_dim, dtype=dtype, param_dtype=weight_dtype)
        self.mixer: Any = mixer.build(config.emb_dim, num_query_heads, **sizes, rngs=rngs)

    def __call__(
        self,
        inputs_q: Float[Array, "b t d"],
        inputs_kv: Any = None,
        inputs_positions: Any = None,
        decoder_segment_ids: Array | None = None,
        out_sharding: Any = None,
        **options: Any,
    ) -> tuple[Float[Array, "b t d"], Any]:
        """Returns the output and ``kv_cache`` as it came; ValueError for what a memory has not."""
        for name in ("bidirectional_mask", "previous_chunk", "shared_key", "shared_value"):
            if options.get(name) is not None:
                raise ValueError(f"a memory has no {name}")
        documents = () if decoder_segment_ids is None else (decoder_segment_ids,)
        return self.mixer(inputs_q, *documents), options.get("kv_cache")
