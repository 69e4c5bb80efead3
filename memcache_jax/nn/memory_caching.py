"""The Memory Caching layer: a drop-in for causal self-attention."""

from typing import Any, Literal, get_args, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from memcache_jax import _checks
from memcache_jax._arguments import check_configuration
from memcache_jax._gates import gates_of_states
from memcache_jax._typing import Array, Float, Int
from memcache_jax.aggregation import Aggregation
from memcache_jax.caching import Implementation, Start, check_implementation
from memcache_jax.memories import Control, Memory
from memcache_jax.nn.layer_cache import LayerCache
from memcache_jax.nn.layers import CausalConv, Linear, l2_normalize
from memcache_jax.segmentation import Segmentation
from memcache_jax.sharding.memory_caching import Exchange, memory_caching_over_mesh
from memcache_jax.sharding.mesh import partitioned
from memcache_jax.streaming import check_options, extend, init_cache


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
      exchange: on a mesh with parts of a sequence, how they get each other's states: ``"gather"``,
        all at once, or ``"ring"``, one part's after the other's, in less memory.
      dtype: dtype of the projections' arithmetic and of the output; by default the wider of the
        input's and ``param_dtype``, as in Flax. Memory states and gates are always float32 or
        wider.
      param_dtype: dtype of the parameters.
      rngs: random keys.

    Raises:
      ValueError: if ``num_heads`` does not divide ``in_features`` and no ``head_dim`` is given, if
        the memory's chunk size does not divide the segment size, or for an unknown ``start`` or
        ``exchange``.

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
        exchange: Exchange = "gather",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_configuration(memory, aggregation, segmentation)
        _checks.check_choice("start", start, ("independent", "checkpoint"))
        _checks.check_choice("connector", connector, ("learned", "query"))
        if distances < 2:
            raise ValueError(f"distances must be at least 2, got {distances}")
        check_implementation(implementation)
        _checks.check_choice("exchange", exchange, get_args(Exchange))
        self.in_features, self.num_heads = in_features, num_heads
        self.head_dim = _checks.check_heads(in_features, num_heads, head_dim)
        self.memory, self.aggregation, self.segmentation = memory, aggregation, segmentation
        self.start: Start = start
        self.implementation: Implementation | None = implementation
        self.exchange: Exchange = exchange
        self.dtype = dtype
        inner = num_heads * self.head_dim

        def linear(size_out: int, **options: Any) -> Linear:
            options = dict(axes=("embed", "heads")) | options
            return Linear(
                in_features, size_out, dtype=dtype, param_dtype=param_dtype, rngs=rngs, **options
            )

        def conv(kernel_init=jax.nn.initializers.normal(conv_width**-0.5)) -> CausalConv:
            return CausalConv(
                inner, conv_width, kernel_init=kernel_init, param_dtype=param_dtype, rngs=rngs
            )

        self.query, self.value = linear(inner), linear(inner)
        self.query_conv, self.value_conv = conv(), conv()
        # Keys and connectors that start as the queries' copies match from the first step; with
        # unrelated maps recall stays on a plateau.
        self.key = linear(inner, kernel_init=_copy(self.query.kernel))
        self.key_conv = conv(_copy(self.query_conv.kernel))
        if aggregation.gate == "position":
            self.connector = linear(num_heads * distances)
        elif aggregation.gate == "content":
            if connector == "learned":
                self.connector = linear(inner, kernel_init=_copy(self.query.kernel))
            init = partitioned(jax.nn.initializers.constant(10.0), "heads")
            self.temperature = nnx.Param(init(jax.random.key(0), (num_heads,), param_dtype))

        self.controls = nnx.Dict()
        for name, control in memory.controls.items():
            if control.optional or control.per_head is not None:
                continue
            self.controls[name] = linear(
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
            normal = jax.nn.initializers.normal(shape[1] ** -0.5)
            longest = shape.index(max(shape))
            axes = ("embed" if axis == longest else None for axis in range(len(shape)))
            init = partitioned(normal, "heads", *axes)
            self.weights[name] = nnx.Param(init(rngs.params(), (num_heads, *shape), param_dtype))

        self.norm = nnx.RMSNorm(self.head_dim, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.output_gate = linear(inner)
        self.out = Linear(
            inner,
            in_features,
            axes=("heads", "embed"),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    @overload
    def __call__(
        self, x: Array, document_ids: Array | None = None, *, cache: None = None
    ) -> Array: ...

    @overload
    def __call__(
        self, x: Array, document_ids: None = None, *, cache: LayerCache
    ) -> tuple[Array, LayerCache]: ...

    def __call__(
        self,
        x: Float[Array, "b t d"],
        document_ids: Int[Array, "b t"] | None = None,
        *,
        cache: LayerCache | None = None,
    ) -> Any:
        """Mixes tokens causally.

        Args:
          x: the input; T need not be a multiple of the segment size.
          document_ids: for documents packed into one sequence, an id per token: nothing crosses
            from one document into another.
          cache: for the next tokens of a stream, as ``extend``.

        Returns:
          The output, of x's shape, in ``dtype``; with a cache, also the cache after it.

        Raises:
          ValueError: for an input that is not (b, t, in_features), document_ids that are not
            integers (b, t), or both document_ids and a cache.
        """
        if cache is not None:
            if document_ids is not None:
                raise ValueError("a cache is of one document in each row: give no document_ids")
            return self.extend(x, cache)
        y = memory_caching_over_mesh(
            **self.operands(x, document_ids),
            memory=self.memory,
            aggregation=self.aggregation,
            segmentation=self.segmentation,
            start=self.start,
            document_ids=document_ids,
            implementation=self.implementation,
            exchange=self.exchange,
        )
        return self._output(x if self.dtype is None else x.astype(self.dtype), y)

    def operands(
        self, x: Float[Array, "b t d"], document_ids: Int[Array, "b t"] | None = None
    ) -> dict[str, Any]:
        """The arrays that a call gives to ``mc.memory_caching``, by the names of its arguments.

        Args:
          x: the input.
          document_ids: as for a call.

        Returns:
          ``query``, ``key``, ``value``, ``connector`` (or None), ``controls`` and ``weights``.

        Raises:
          ValueError: as a call.

        Example:
          >>> import jax.numpy as jnp, memcache_jax as mc
          >>> from flax import nnx
          >>> layer = mc.nn.MemoryCaching(8, 2, memory=mc.memories.SSD(),
          ...                             aggregation=mc.GRM(), segmentation=mc.Constant(4),
          ...                             rngs=nnx.Rngs(0))
          >>> operands = layer.operands(jnp.ones((1, 14, 8)))
          >>> operands["query"].shape, sorted(operands["controls"])
          ((1, 14, 2, 4), ['lam', 'log_alpha'])
        """
        _checks.check_input(x, self.in_features)
        if document_ids is not None:
            _checks.check_documents(document_ids, x.shape[:2])
        x = x if self.dtype is None else x.astype(self.dtype)
        rows = (
            conv(linear(x), document_ids)
            for conv, linear in zip(self._convs(), self._linears(), strict=True)
        )
        return self._tokens(x, *rows) | {"weights": self._initial_weights()}

    def gates(self, x: Float[Array, "b t d"]) -> Float[Array, "b t h states"]:
        """The gates with which a call weighs the states that each token reads, to look at.

        Args:
          x: the input.

        Returns:
          In float32 or wider, the gates of the states of ``segmentation.plan(t).buckets``, in that
          order, and last the live state's. A state that a token does not read has 0; ``Residual``
          has 1 for all others.

        Raises:
          ValueError: for an input that is not (b, t, in_features).

        Example:
          >>> import jax.numpy as jnp, memcache_jax as mc
          >>> from flax import nnx
          >>> layer = mc.nn.MemoryCaching(8, 2, memory=mc.memories.SSD(),
          ...                             aggregation=mc.SSC(top_k=1), segmentation=mc.Constant(4),
          ...                             rngs=nnx.Rngs(0))
          >>> gates = layer.gates(jnp.ones((1, 14, 8)))  # of 3 cached states and the live one
          >>> gates.shape, (gates > 0).sum(axis=-1)[0, ::4, 0].tolist()
          ((1, 14, 2, 4), [1, 2, 2, 2])
        """
        operands = self.operands(x)
        return gates_of_states(
            operands["key"],
            operands["connector"],
            aggregation=self.aggregation,
            segmentation=self.segmentation,
        )

    def init_cache(
        self, batch_size: int, max_length: int | None = None, **options: Any
    ) -> LayerCache:
        """An empty cache for ``extend``.

        Args:
          batch_size: rows.
          max_length: tokens that a row may take; None where ``options`` bound the memory instead.
          options: how states are kept: ``max_segments``, ``policy``, ``cache_dtype`` and
            ``placement`` of ``mc.init_cache``.

        Raises:
          ValueError: as ``mc.init_cache``.
        """
        _checks.check_sizes(batch_size=batch_size)
        check_options(options)
        cache = init_cache(
            batch_size,
            self.num_heads,
            self.head_dim,
            self.head_dim,
            memory=self.memory,
            weights=self._initial_weights(),
            aggregation=self.aggregation,
            segmentation=self.segmentation,
            start=self.start,
            max_length=max_length,
            dtype=jnp.promote_types(self.query.param_dtype, jnp.float32),
            **options,
        )
        dtype = self.query.param_dtype if self.dtype is None else self.dtype
        tails = tuple(conv.init_tail(batch_size, dtype) for conv in self._convs())
        return LayerCache(cache, tails)

    def extend(
        self, x: Float[Array, "b t d"], cache: LayerCache, lengths: Int[Array, "b"] | None = None
    ) -> tuple[Float[Array, "b t d"], LayerCache]:
        """The next tokens of a stream: the outputs that a call on the whole has for them.

        Args:
          x: the tokens, any number of them.
          cache: from ``init_cache`` or the call before.
          lengths: tokens of each row that count, the first ones; all by default.

        Returns:
          The outputs, and the cache after the last token.

        Raises:
          ValueError: for an input that is not (b, t, in_features), or that does not fit the cache
            or find room in it, or for a cache of another layer.
        """
        _checks.check_input(x, self.in_features)
        _checks.check_cache(cache, LayerCache, (self.num_heads, self.head_dim))
        x = x if self.dtype is None else x.astype(self.dtype)
        counts = jnp.full(len(x), x.shape[1]) if lengths is None else lengths
        rows, tails = zip(
            *(
                conv.extend(linear(x), tail, counts)
                for conv, linear, tail in zip(
                    self._convs(), self._linears(), cache.tails, strict=True
                )
            ),
            strict=True,
        )
        y, memory = extend(
            cache.memory,
            **self._tokens(x, *rows),
            lengths=lengths,
            memory=self.memory,
            weights=self._initial_weights(),
            aggregation=self.aggregation,
            segmentation=self.segmentation,
            start=self.start,
        )
        return self._output(x, y), LayerCache(memory, tails)

    def _linears(self) -> tuple[Linear, ...]:
        return self.query, self.key, self.value

    def _convs(self) -> tuple[CausalConv, ...]:
        return self.query_conv, self.key_conv, self.value_conv

    def _initial_weights(self) -> dict[str, Array]:
        return {name: weight[...] for name, weight in self.weights.items()}

    def _tokens(self, x: Array, query: Array, key: Array, value: Array) -> dict[str, Any]:
        """What the functional core takes of each token."""
        query, key = l2_normalize(self._heads(query)), l2_normalize(self._heads(key))
        connector = None
        if self.aggregation.gate == "position":
            connector = self._heads(self.connector(x))
        elif self.aggregation.gate == "content":
            learned = hasattr(self, "connector")
            connector = l2_normalize(self._heads(self.connector(x))) if learned else query
            connector *= self.temperature[...].astype(x.dtype)[None, None, :, None]
        controls = {
            name: self._control(control, name, x)
            for name, control in self.memory.controls.items()
            if not control.optional
        }
        return dict(
            query=query,
            key=key,
            value=self._heads(value),
            connector=connector,
            controls=self.memory.coupled(controls),
        )

    def _output(self, x: Float[Array, "b t d"], y: Float[Array, "b t h k"]) -> Array:
        y = self.norm(y).reshape(*x.shape[:2], -1)
        return self.out(y * jax.nn.silu(self.output_gate(x)))

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
