"""What a layer of memory caching consists of, whatever makes its queries, keys and values."""

from typing import Any, Literal

from flax import nnx
from jax.typing import DTypeLike

from memcache_jax._typing import Array, Exchange, Float, Implementation, Int, Start
from memcache_jax.aggregation import Aggregation
from memcache_jax.memories import Memory
from memcache_jax.segmentation import Segmentation


class LayerParts(nnx.Module):
    """The attributes of a ``MemoryLayer``, and the methods that its subclasses write.

    They compute the memory's arguments from the layer's input, and the layer's output from what is
    read.

    Attributes:
      in_features: model dimension d of the input and the output.
      num_heads: heads h of states.
      head_dim: key dimension of a head.
      value_dim: value dimension of a head.
      memory: the write rule.
      aggregation: how reads of live and cached memories become one output.
      segmentation: where states are cached.
      start: what a segment's memory begins with.
      implementation: as in ``memory_caching``.
      exchange: how the parts of a sequence on a mesh get each other's states.
      dtype: dtype of the arithmetic; None for the wider of the input's and ``param_dtype``.
      param_dtype: dtype of the parameters.
      states: ``"own"``, or ``"previous"`` to read the cached states of the nearest earlier layer of
        a model that has its own.
      follows: whether it also reads what that layer chose, in place of a connector.
    """

    in_features: int
    num_heads: int
    head_dim: int
    value_dim: int
    memory: Memory
    aggregation: Aggregation
    segmentation: Segmentation
    start: Start
    implementation: Implementation | None
    exchange: Exchange
    dtype: DTypeLike | None
    param_dtype: DTypeLike
    states: Literal["own", "previous"] = "own"
    follows: bool = False

    def _tokens(
        self, x: Float[Array, "b t d"], document_ids: Int[Array, "b t"] | None, first: Any
    ) -> tuple[dict[str, Any], Any]:
        """The per-token arguments of ``mc.memory_caching``, and what ``_output`` needs beside x.

        ``first`` is what the model's first layer hands to later ones; None if it does not.
        """
        raise NotImplementedError

    def _next_tokens(
        self,
        x: Float[Array, "b t d"],
        tails: tuple,
        counts: Int[Array, "b"],
        position: Int[Array, "b"],
        first: Any,
    ) -> tuple[dict[str, Any], Any, tuple]:
        """The same of a stream's next tokens, ``counts`` of which count; and the next tails.

        ``position`` is the number of tokens before them.
        """
        raise NotImplementedError

    def _empty_tails(self, batch_size: int, dtype: DTypeLike) -> tuple:
        """What a stream keeps of the inputs before its first token."""
        raise NotImplementedError

    def _output(
        self, x: Float[Array, "b t d"], y: Float[Array, "b t h v"], kept: Any
    ) -> Float[Array, "b t d"]:
        """The layer's output, of its input, of what the memories return, and of ``_tokens``."""
        raise NotImplementedError

    def _empty_output(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """The output of an input without rows or tokens."""
        raise NotImplementedError

    def _initial_weights(self) -> dict[str, Array]:
        """The initial weights of the memory."""
        return {}
