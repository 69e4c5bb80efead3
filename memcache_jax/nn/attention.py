"""Causal self-attention with rotary positions, the Transformer++ baseline's mixer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from memcache_jax import _checks
from memcache_jax._documents import count_documents
from memcache_jax._typing import Array, Float, Int
from memcache_jax.nn.layers import Linear


class Attention(nnx.Module):
    """Causal softmax attention with RoPE, over all past tokens or a sliding window of them.

    y_t = sum over j <= t of softmax_j(<R_t q_t, R_j k_j> / sqrt(k)) v_j in each head, with the
    rotations R of arXiv:2104.09864.

    Args:
      in_features: model dimension d.
      num_heads: heads h.
      head_dim: dimension of a head, even; ``in_features // num_heads`` by default.
      window: tokens that a token sees, itself included; None for all.
      rope_base: wavelength base of the rotary embedding.
      dtype: dtype of the arithmetic; by default the wider of the input's and ``param_dtype``.
      param_dtype: dtype of the parameters.
      rngs: random keys.

    Raises:
      ValueError: for head sizes that do not fit, or a window below 1.

    Example:
      >>> import jax.numpy as jnp, memcache_jax as mc
      >>> from flax import nnx
      >>> mc.nn.Attention(64, 4, window=32, rngs=nnx.Rngs(0))(jnp.ones((2, 100, 64))).shape
      (2, 100, 64)
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        window: int | None = None,
        rope_base: float = 10_000.0,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.in_features, self.num_heads = in_features, num_heads
        self.head_dim = _checks.check_heads(in_features, num_heads, head_dim)
        if self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {self.head_dim}")
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1 token, got {window}")
        self.window, self.rope_base, self.dtype = window, rope_base, dtype
        inner = num_heads * self.head_dim
        options: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.query = Linear(in_features, inner, **options)
        self.key = Linear(in_features, inner, **options)
        self.value = Linear(in_features, inner, **options)
        self.out = Linear(inner, in_features, **options)

    def __call__(
        self, x: Float[Array, "b t d"], document_ids: Int[Array, "b t"] | None = None
    ) -> Float[Array, "b t d"]:
        """Mixes tokens causally.

        Args:
          x: the input.
          document_ids: for documents packed into one sequence, an id per token: where it
            changes, a document begins, and tokens see their own document only.

        Raises:
          ValueError: for an input that is not (b, t, in_features), or document_ids that are not
            integers (b, t).
        """
        _checks.check_input(x, self.in_features)
        mask = None
        if document_ids is not None:
            _checks.check_documents(document_ids, x.shape[:2])
            document = count_documents(document_ids)
            mask = document[:, None, :, None] == document[:, None, None, :]
        query, key, value = (
            linear(x).reshape(*x.shape[:2], self.num_heads, self.head_dim)
            for linear in (self.query, self.key, self.value)
        )
        y = jax.nn.dot_product_attention(
            rotate(query, self.rope_base),
            rotate(key, self.rope_base),
            value,
            mask=mask,
            is_causal=True,
            local_window_size=None if self.window is None else (self.window - 1, 0),
        )
        return self.out(y.reshape(*x.shape[:2], -1))


def rotate(x: Float[Array, "b t h k"], base: float) -> Float[Array, "b t h k"]:
    """Rotary position embedding (arXiv:2104.09864): pairs (i, i + k/2) turn by t base^(-2i/k)."""
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequency[None]
    cos, sin = (f(angle)[None, :, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
