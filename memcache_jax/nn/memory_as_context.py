"""Attention to what a memory recalls: the memory as context of Titans."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from memcache_jax import _checks
from memcache_jax._typing import Array, Float, Int
from memcache_jax.nn.attention import check_attention
from memcache_jax.nn.context_attention import ContextAttention
from memcache_jax.nn.parallel import ParallelCache, check_parts


@dataclasses.dataclass(frozen=True)
class MemoryAsContextMixer:
    """Blocks mix tokens with ``MemoryAsContext``.

    Attributes:
      memory: a mixer whose outputs are what is recalled, such as ``MemoryCachingMixer``.
      window: tokens in a window of the attention.
      num_persistent: learned persistent tokens in every window.
      rope_base: wavelength base of the rotary embedding.
    """

    memory: Any
    window: int = 64
    num_persistent: int = 4
    rope_base: float = 10_000.0

    parts: ClassVar[tuple[str, ...]] = ("memory",)

    def __post_init__(self) -> None:
        check_parts(self)
        _checks.check_fields(self, sizes=("window",))
        persistent = _checks.check_integer("num_persistent", self.num_persistent, 0)
        _, rope_base = check_attention(self.window, self.rope_base, None)
        _checks.set_fields(self, num_persistent=persistent, rope_base=rope_base)

    def build(self, in_features: int, num_heads: int, **options: Any) -> "MemoryAsContext":
        """Returns the layer."""
        return MemoryAsContext(self, in_features, num_heads, **options)


class MemoryAsContext(nnx.Module):
    """Memory as context (MAC, Sec. 4.1 of Titans, arXiv:2501.00663), with cached states.

    Tokens are divided into windows of W. With persistent tokens p_1, ..., p_P and the first token w
    of t's window::

        h_t = memory(x)_t
        y_t = Attn(x_t; p_1, ..., p_P, h_w, ..., h_t, x_w, ..., x_t)
        o_t = y_t * sigmoid(h_t)

    The memory is a layer of its own, with any write rule, aggregation and segmentation, so that h_t
    also reads its cached states. Keys and values of h and x are made by the same maps, and h_j and
    x_j have the same rotary position, counted from the start of the window. Persistent tokens are
    learned keys and values without a position. Where documents are packed, windows end at multiples
    of W in the row, as segments do at those of C, and with each document.

    Titans reads a window's h from the memory as it was before the window, writes the attention's
    outputs y into it, and multiplies y by what the memory then recalls of y. Its windows wait for
    each other. Here, as in titans-pytorch, the memory writes and reads the layer's input, so that
    all windows are computed at once: h_t also recalls the window's tokens up to t, and the gate is
    that of x_t.

    Args:
      mixer: the memory and the sizes.
      in_features: model dimension d.
      num_heads: heads of the attention and of the memory.
      options: ``head_dim``, ``dtype``, ``param_dtype`` and ``rngs``, of both.

    Raises:
      ValueError: for an odd ``head_dim``, or as the memory does.

    Example:
      >>> import jax.numpy as jnp, memcache_jax as mc
      >>> from flax import nnx
      >>> memory = mc.nn.MemoryCachingMixer(mc.memories.Titans(8), mc.GRM(), mc.Constant(16))
      >>> mixer = mc.nn.MemoryAsContextMixer(memory, window=16)
      >>> mixer.build(32, 2, rngs=nnx.Rngs(0))(jnp.ones((1, 50, 32))).shape
      (1, 50, 32)
    """

    def __init__(
        self, mixer: MemoryAsContextMixer, in_features: int, num_heads: int, **options: Any
    ) -> None:
        sizes: Mapping[str, Any] = dict(
            window=mixer.window, num_persistent=mixer.num_persistent, rope_base=mixer.rope_base
        )
        self.memory = mixer.memory.build(in_features, num_heads, **options)
        self.attention = ContextAttention(in_features, num_heads, **sizes, **options)

    def __call__(
        self, x: Float[Array, "b t d"], document_ids: Int[Array, "b t"] | None = None
    ) -> Float[Array, "b t d"]:
        """Mixes tokens causally; no document sees another."""
        documents = () if document_ids is None else (document_ids,)
        recalled = self.memory(x, *documents)
        return _gated(self.attention(_beside(x, recalled), *documents), recalled)

    def init_cache(
        self, batch_size: int, max_length: int | None = None, **options: Any
    ) -> ParallelCache:
        """Returns an empty cache for ``extend``, of the memory and of the last window."""
        return ParallelCache.of((self.memory, self.attention), batch_size, max_length, **options)

    def extend(
        self, x: Float[Array, "b t d"], cache: ParallelCache, lengths: Any = None
    ) -> tuple[Float[Array, "b t d"], ParallelCache]:
        """Continues a stream: its outputs are those of one call on the whole sequence."""
        _checks.check_instance("cache", cache, ParallelCache, "a ParallelCache")
        memory: Any = self.memory
        recalled, of_memory = memory.extend(x, cache.left, lengths)
        y, window = self.attention.extend(_beside(x, recalled), cache.right, lengths)
        return _gated(y, recalled), ParallelCache(of_memory, window)


def _beside(x: Float[Array, "b t d"], recalled: Float[Array, "b t d"]) -> Float[Array, "b t dd"]:
    return jnp.concatenate([x, recalled.astype(x.dtype)], axis=-1)


def _gated(y: Float[Array, "b t d"], recalled: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    return y * jax.nn.sigmoid(recalled)
