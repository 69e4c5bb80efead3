"""The Memory Caching layer: a drop-in for causal self-attention."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from memcache_jax import _checks
from memcache_jax._arguments import check_configuration
from memcache_jax._typing import Array, Float, Int
from memcache_jax.aggregation import Aggregation
from memcache_jax.caching import Implementation, Start, memory_caching
from memcache_jax.memories import Control, Memory
from memcache_jax.nn.layers import CausalConv, Linear, l2_normalize
from memcache_jax.segmentation import Segmentation


class MemoryCaching(nnx.Module):
    """A recurrent memory with cached segment states, as a token mixer.

    The block of Titans and of App. B of arXiv:2602.24281: projections to q, k, v, a causal
    depthwise convolution on each, SiLU, L2 norm of q and k, memory caching, RMSNorm per head, an
    output gate and a projection. Gated aggregations also project the connector u, L2-normalised
    and scaled by a learned temperature per head. The rule's coefficients are linear maps of the
    input. W_k and W_u start as copies of W_q.

    Args:
      in_features: model dimension d of the input and the output.
      num_heads: heads h.
      memory: the write rule.
      aggregation: how reads of live and cached memories become one output.
      segmentation: where states are cached.
      head_dim: key and value dimension of a head; ``in_features // num_heads`` by default.
      start: what a segment's memory begins with, ``"independent"`` or ``"checkpoint"``.
      connector: what content gates compare with pooled keys: a ``"learned"`` map of the input, or
        the ``"query"``.
      distances: for gates by position, how many distances have logits of their own.
      conv_width: taps of the convolution.
      implementation: as in ``memory_caching``.
      dtype: dtype of the projections' arithmetic and of the output; by default the wider of the
        input's and ``param_dtype``, as in Flax. Memory states and gates are always float32 or
        wider.
      param_dtype: dtype of the parameters.
      rngs: random keys.

    Raises:
      ValueError: if ``num_heads`` does not divide ``in_features`` and no ``head_dim`` is given, if
        the memory's chunk size does not divide the segment size, or for an unknown ``start``.

    Example:
      >>> import jax.numpy as jnp, memcache_jax as mc
      >>> from flax import nnx
      >>> layer = mc.nn.MemoryCaching(64, 4, memory=mc.memories.Titans(chunk_size=16),
      ...                             aggregation=mc.GRM(), segmentation=mc.Constant(64),
      ...                             rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 100, 64))).shape
      (2, 100, 64)
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        *,
        memory: Memory,
        aggregation: Aggregation,
        segmentation: Segmentation,
        head_dim: int | None = None,
        start: Start = "independent",
        connector: Literal["learned", "query"] = "learned",
        distances: int = 64,
        conv_width: int = 4,
        implementation: Implementation | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_configuration(memory, aggregation, segmentation)
        _checks.check_choice("start", start, ("independent", "checkpoint"))
        _checks.check_choice("connector", connector, ("learned", "query"))
        if distances < 2:
            raise ValueError(f"distances must be at least 2, got {distances}")
        _checks.check_choice("implementation", implementation, (None, "xla", "reference"))
        self.in_features, self.num_heads = in_features, num_heads
        self.head_dim = _checks.check_heads(in_features, num_heads, head_dim)
        self.memory, self.aggregation, self.segmentation = memory, aggregation, segmentation
        self.start: Start = start
        self.implementation: Implementation | None = implementation
        self.dtype = dtype
        inner = num_heads * self.head_dim

        def linear(size_in: int, size_out: int, **options: Any) -> Linear:
            return Linear(
                size_in, size_out, dtype=dtype, param_dtype=param_dtype, rngs=rngs, **options
            )

        def conv(kernel_init=jax.nn.initializers.normal(conv_width**-0.5)) -> CausalConv:
            return CausalConv(
                inner, conv_width, kernel_init=kernel_init, param_dtype=param_dtype, rngs=rngs
            )

        self.query, self.value = linear(in_features, inner), linear(in_features, inner)
        self.query_conv, self.value_conv = conv(), conv()
        # Keys and connectors that start as the queries' copies match from the first step; with
        # unrelated maps recall stays on a plateau.
        self.key = linear(in_features, inner, kernel_init=_copy(self.query.kernel))
        self.key_conv = conv(_copy(self.query_conv.kernel))
        if aggregation.gate == "position":
            self.connector = linear(in_features, num_heads * distances)
        elif aggregation.gate == "content":
            if connector == "learned":
                self.connector = linear(in_features, inner, kernel_init=_copy(self.query.kernel))
            self.temperature = nnx.Param(jnp.full((num_heads,), 10.0, param_dtype))

        self.controls = nnx.Dict()
        for name, control in memory.controls.items():
            if control.optional or control.per_head is not None:
                continue
            self.controls[name] = linear(
                in_features,
                num_heads * (self.head_dim if control.axes.endswith("k") else 1),
                use_bias=True,
                # Coefficients start near their bias whatever the token: a run of equal tokens with
                # long steps would drive a deep memory apart.
                kernel_init=jax.nn.initializers.variance_scaling(0.01, "fan_in", "normal"),
                bias_init=jax.nn.initializers.constant(control.bias),
            )
        self.weights = nnx.Dict()
        for name, shape in memory.weight_shapes(self.head_dim, self.head_dim).items():
            # Not zero: the gradients of both layers of a zero network are zero for ever.
            initial = jax.random.normal(rngs.params(), (num_heads, *shape), param_dtype)
            self.weights[name] = nnx.Param(initial * shape[1] ** -0.5)

        self.norm = nnx.RMSNorm(self.head_dim, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.gate = linear(in_features, inner)
        self.out = linear(inner, in_features)

    def __call__(
        self, x: Float[Array, "b t d"], document_ids: Int[Array, "b t"] | None = None
    ) -> Float[Array, "b t d"]:
        """Mixes tokens causally.

        Args:
          x: the input; T need not be a multiple of the segment size.
          document_ids: for documents packed into one sequence, an id per token: nothing crosses
            from one document into another.

        Returns:
          The output, of x's shape, in ``dtype``.

        Raises:
          ValueError: for an input that is not (b, t, in_features), or document_ids that are not
            integers (b, t).
        """
        _checks.check_input(x, self.in_features)
        if document_ids is not None:
            _checks.check_documents(document_ids, x.shape[:2])
        x = x if self.dtype is None else x.astype(self.dtype)
        query = l2_normalize(self._heads(self.query_conv(self.query(x), document_ids)))
        key = l2_normalize(self._heads(self.key_conv(self.key(x), document_ids)))
        value = self._heads(self.value_conv(self.value(x), document_ids))
        connector = None
        if self.aggregation.gate == "position":
            connector = self._heads(self.connector(x))
        elif self.aggregation.gate == "content":
            learned = hasattr(self, "connector")
            connector = l2_normalize(self._heads(self.connector(x))) if learned else query
            connector *= self.temperature[...].astype(x.dtype)[None, None, :, None]
        y = memory_caching(
            query,
            key,
            value,
            connector,
            memory=self.memory,
            controls=self.memory.coupled(
                {
                    name: self._control(control, name, x)
                    for name, control in self.memory.controls.items()
                    if not control.optional
                }
            ),
            weights={name: weight[...] for name, weight in self.weights.items()},
            aggregation=self.aggregation,
            segmentation=self.segmentation,
            start=self.start,
            document_ids=document_ids,
            implementation=self.implementation,
        )
        y = self.norm(y).reshape(*x.shape[:2], -1)
        return self.out(y * jax.nn.silu(self.gate(x)))

    def _heads(self, x: Float[Array, "b t hk"]) -> Float[Array, "b t h k"]:
        return x.reshape(*x.shape[:2], self.num_heads, -1)

    def _control(self, control: Control, name: str, x: Float[Array, "b t d"]) -> Array:
        """A coefficient of the rule, in float32: a decay near 1 is lost in bfloat16."""
        if control.per_head is not None:
            return control.per_head(self.num_heads)
        logits = self.controls[name](x)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        if control.axes.endswith("k"):
            logits = self._heads(logits)
        return control.scale * control.activation(logits)


def _copy(param: nnx.Param) -> Any:
    """An initialiser that returns the value of another parameter."""
    return lambda key, shape, dtype: param[...].astype(dtype)
