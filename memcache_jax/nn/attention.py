"""Causal self-attention with rotary positions: the mixer of the Transformer++ baseline."""

import dataclasses
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from memcache_jax import _checks
from memcache_jax._typing import Array, Bool, Float, Int
from memcache_jax.engine.documents import count_documents
from memcache_jax.nn.calls import MixerCall, answer, read_mixer_call
from memcache_jax.nn.host_options import HostOptions, read_host_options
from memcache_jax.nn.layers import Linear
from memcache_jax.streaming import check_options
from memcache_jax.streaming.protocol import MixerCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionCache(MixerCache):
    """Keys and values that later tokens see: all so far, or the last ones for a window.

    Attributes:
      key: (b, h, past, k), contiguous per head, as reads go through them.
      value: likewise.
      position: tokens taken so far by each row, (b,).
      first: this layer's first row in a stack of layers, which share keys and values.
    """

    key: Any
    value: Any
    position: Any
    first: Any = None

    shared = ("key", "value")
    small = zeroed = ("position",)

    @property
    def head_shape(self) -> tuple[int, ...]:
        """Number of heads, and their dimension."""
        return self.key.shape[1::2]


class Attention(nnx.Module):
    """Causal softmax attention with RoPE, over all past tokens or a sliding window.

    y_t = sum over j <= t of softmax_j(<R_t q_t, R_j k_j> / sqrt(k)) v_j in each head, with the
    rotations R of arXiv:2104.09864.

    Args:
      in_features: model dimension d.
      num_heads: heads h.
      head_dim: dimension of a head, even; ``in_features // num_heads`` by default.
      window: how many tokens a token sees, itself included; None for all.
      rope_base: wavelength base of the rotary embedding.
      implementation: of whole sequences, ``"xla"`` or ``"cudnn"``, which is for bfloat16 on NVIDIA
        GPUs and needs no memory that is quadratic in their length; JAX's default where it is None.
        Streams are XLA's.
      dtype: dtype of the arithmetic; by default the wider of the input's and ``param_dtype``.
      param_dtype: dtype of the parameters.
      rngs: random keys.
      host: what hosts pass to attention, such as ``kernel_init`` and ``use_bias``: see
        ``HostOptions``.

    Raises:
      TypeError: for an unknown keyword.
      ValueError: for head sizes that do not fit, a window below 1, an unknown implementation, or
        what a host asks for and the layer does not do.

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
        implementation: Literal["xla", "cudnn"] | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **host: Unpack[HostOptions],
    ) -> None:
        self.in_features, self.num_heads = in_features, num_heads
        name = type(self).__name__
        self.head_dim, of = read_host_options(name, in_features, num_heads, head_dim, **host)
        if self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {self.head_dim}")
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1 token, got {window}")
        _checks.check_choice("implementation", implementation, (None, "xla", "cudnn"))
        self.implementation: Literal["xla", "cudnn"] | None = implementation
        self.window, self.rope_base, self.dtype = window, rope_base, dtype
        inner = num_heads * self.head_dim
        options: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.query, self.key, self.value = (
            Linear(in_features, inner, axes=("embed", "heads"), **options, **of.inputs)
            for _ in range(3)
        )
        self.out = Linear(inner, in_features, axes=("heads", "embed"), **options, **of.out)

    def __call__(
        self,
        x: Float[Array, "b t d"] | None = None,
        document_ids: Int[Array, "b t"] | Float[Array, "b t d"] | None = None,
        inputs_v: Float[Array, "b t d"] | None = None,
        *,
        cache: AttentionCache | None = None,
        **call: Unpack[MixerCall],
    ) -> Any:
        """Mixes tokens causally.

        Args:
          x: the input.
          document_ids: for documents packed into one sequence, an id per token: a document
            begins where it changes, and tokens see only their own document.
          inputs_v: None or x, and ``document_ids`` may be x, for hosts that call attention so.
          cache: continues a stream, as ``extend`` does.
          call: what hosts pass to attention, such as ``segment_ids``, ``positions``, ``mask`` and
            ``deterministic``: see ``MixerCall``. A window narrows any mask.

        Returns:
          The output, of x's shape; with a cache, also the cache after these tokens. Where a traced
          mask or traced positions ask for what the layer does not do, NaN.

        Raises:
          ValueError: for an input that is not (b, t, in_features), document_ids that are not
            integers (b, t), both document_ids and a cache, or a mask of later tokens.
        """
        x, read = read_mixer_call(
            x, document_ids, inputs_v, self.num_heads, self.in_features, **call
        )
        if cache is not None:
            _checks.check_cache(cache, AttentionCache, (self.num_heads, self.head_dim))
        return answer(read, x, cache, whole=self._whole, extend=self.extend, takes_masks=True)

    def _whole(
        self,
        x: Float[Array, "b t d"],
        document_ids: Int[Array, "b t"] | None,
        mask: Bool[Array, "_ _ t t"] | None = None,
    ) -> Float[Array, "b t d"]:
        if 0 in x.shape[:2]:
            return self.out(self.value(x))
        if document_ids is not None:
            document = count_documents(document_ids)
            same = document[:, None, :, None] == document[:, None, None, :]
            mask = same if mask is None else mask & same
        query, key, value = self._rows(x, None)
        y = jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=mask,
            is_causal=True,
            local_window_size=None if self.window is None else (self.window - 1, 0),
            implementation=self.implementation,
        )
        return self.out(y.reshape(*x.shape[:2], -1))

    def init_cache(
        self, batch_size: int, max_length: int | None = None, **options: Any
    ) -> AttentionCache:
        """Returns an empty cache for ``extend``.

        Args:
          batch_size: number of rows.
          max_length: most tokens per row; not needed with a window.
          options: those of ``MemoryCaching``, which have no effect here.

        Raises:
          ValueError: for sizes below 1, or without both a window and ``max_length``.
        """
        _checks.check_sizes(batch_size=batch_size, max_length=max_length)
        check_options(options)
        if self.window is None and max_length is None:
            raise ValueError("attention without a window keeps all tokens: give max_length")
        past: Any = max_length if self.window is None else self.window - 1
        dtype = self.query.param_dtype if self.dtype is None else self.dtype
        shape = (batch_size, self.num_heads, past, self.head_dim)
        key, value = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
        return AttentionCache(key, value, jnp.zeros(batch_size, jnp.int32))

    def extend(
        self,
        x: Float[Array, "b t d"],
        cache: AttentionCache,
        lengths: Int[Array, "b"] | None = None,
    ) -> tuple[Float[Array, "b t d"], AttentionCache]:
        """Continues a stream: its outputs are those of one call on the whole sequence.

        Args:
          x: the next tokens.
          cache: from ``init_cache`` or the previous call.
          lengths: how many of each row's tokens count, from the first on; all by default.

        Returns:
          The outputs, and the cache after these tokens. Tokens beyond a row's room give NaN.

        Raises:
          ValueError: for an input that is not (b, t, in_features), or does not fit the cache.
        """
        _checks.check_input(x, self.in_features)
        _checks.check_cache(cache, AttentionCache, (self.num_heads, self.head_dim))
        length, past = x.shape[1], cache.key.shape[2]
        if self.window is not None and past != self.window - 1:
            raise ValueError(
                f"the cache must hold the last {self.window - 1} tokens for window={self.window}, "
                f"it holds {past}"
            )
        limit = past if self.window is None else None
        _checks.check_room(cache.position, x.shape[:2], lengths, limit)
        lengths = jnp.full(len(x), length, jnp.int32) if lengths is None else lengths
        place = cache.position[:, None] + jnp.arange(length)[None]
        query, *new = self._rows(x, place)
        if self.window is None:
            # Tokens that do not count are put out of range, and dropped.
            there = jnp.where(jnp.arange(length)[None] < lengths[:, None], place, past)
            rows = (0 if cache.first is None else cache.first) + jnp.arange(len(x))[:, None]
            kept = tuple(
                old.at[rows, :, there].set(new.astype(old.dtype), mode="drop")
                for old, new in zip(cache.states, new, strict=True)
            )
            key, value = (cache.own_rows(row) for row in kept)
            seen = jnp.arange(past)[None, None] <= place[..., None]
        else:
            old = (cache.own_rows(row) for row in cache.states)
            new = (jnp.moveaxis(rows, 2, 1) for rows in new)
            key, value = (jnp.concatenate(pair, axis=2) for pair in zip(old, new, strict=True))
            of_key = (cache.position - past)[:, None] + jnp.arange(past + length)[None]
            ago = place[..., None] - of_key[:, None]
            seen = (ago >= 0) & (ago < self.window) & (of_key >= 0)[:, None]
            last = jax.vmap(lambda row, begin: lax.dynamic_slice_in_dim(row, begin, past, axis=1))
            kept = tuple(
                cache.put_rows(old, last(row, lengths))
                for old, row in zip(cache.states, (key, value), strict=True)
            )
        y = _attend(query, key, value, seen[:, None])
        if self.window is None:
            beyond = (place >= past) & (jnp.arange(length)[None] < lengths[:, None])
            y = jnp.where(beyond[..., None, None], jnp.nan, y)
        y = self.out(y.reshape(*x.shape[:2], -1))
        return y, cache.replace(key=kept[0], value=kept[1], position=cache.position + lengths)

    def _rows(
        self, x: Float[Array, "b t d"], position: Int[Array, "_ t"] | None
    ) -> tuple[Array, ...]:
        """Queries, keys and values of tokens at these positions, 0, 1, ... by default."""
        query, key, value = (
            linear(x).reshape(*x.shape[:2], self.num_heads, self.head_dim)
            for linear in (self.query, self.key, self.value)
        )
        return *(rotate(rows, self.rope_base, position) for rows in (query, key)), value


def _attend(
    query: Float[Array, "b t h k"],
    key: Float[Array, "b h s k"],
    value: Float[Array, "b h s k"],
    seen: Bool[Array, "b 1 t s"],
) -> Float[Array, "b t h k"]:
    """Attention over heads-first keys, which ``jax.nn.dot_product_attention`` would transpose."""
    key, value = key.astype(query.dtype), value.astype(query.dtype)
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("bthk,bhsk->bhts", query, key, preferred_element_type=wide)
    weights = jax.nn.softmax(jnp.where(seen, scores * query.shape[-1] ** -0.5, -jnp.inf))
    return jnp.einsum("bhts,bhsk->bthk", weights.astype(value.dtype), value)


def rotate(
    x: Float[Array, "b t h k"], base: float, position: Int[Array, "_ t"] | None = None
) -> Float[Array, "b t h k"]:
    """Rotary embedding (arXiv:2104.09864): the pair (i, i + k/2) turns by t base^(-2i/k)."""
    position = jnp.arange(x.shape[1])[None] if position is None else position
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position.astype(jnp.float32)[..., None] * frequency[None, None]
    cos, sin = (f(angle)[:, :, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
