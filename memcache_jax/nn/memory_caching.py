"""The Memory Caching layer: a drop-in for causal self-attention."""

import functools
from typing import Any, Literal, Unpack, get_args, overload

import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from memcache_jax import _checks
from memcache_jax._typing import Array, Exchange, Float, Implementation, Int, Start
from memcache_jax.aggregation import Aggregation
from memcache_jax.caching import check_configuration, memory_caching
from memcache_jax.engine.run import gates_of_tokens
from memcache_jax.memories import Memory
from memcache_jax.nn.calls import MixerCall, answer, read_mixer_call
from memcache_jax.nn.host_options import HostOptions, read_host_options
from memcache_jax.nn.layer_cache import LayerCache
from memcache_jax.nn.projections import Projections
from memcache_jax.segmentation import Segmentation
from memcache_jax.sharding.division import Division
from memcache_jax.sharding.names import AxisNames, naming
from memcache_jax.streaming import check_options, extend, init_cache
from memcache_jax.streaming.protocol import placed


def check_layer(
    memory: Any,
    aggregation: Any,
    segmentation: Any,
    start: Any,
    connector: Any,
    implementation: Any,
    exchange: Any,
) -> None:
    """Raises ValueError for arguments of ``MemoryCaching`` that no layer can have."""
    check_configuration(memory, aggregation, segmentation, start, implementation)
    _checks.check_choice("connector", connector, ("learned", "query"))
    _checks.check_choice("exchange", exchange, get_args(Exchange))


class MemoryCaching(Projections):
    """A recurrent memory with cached segment states, as a token mixer.

    The block of Titans and of App. B of arXiv:2602.24281: projections to q, k, v, a causal
    depthwise convolution on each, SiLU, L2 norm of q and k, memory caching, RMSNorm per head, an
    output gate and a projection. Aggregations with content gates also project the connector u,
    L2-normalised and scaled by a learned temperature per head. The rule's coefficients are linear
    maps of the input. W_k and W_u start as copies of W_q.

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
      distances: for position gates, the number of distances that have their own logit.
      conv_width: taps of the convolution.
      bounded: whether a deep memory without a ``max_step_norm`` gets one of 1, so that no input,
        however large, makes it diverge; False for the bare equation.
      implementation: as in ``memory_caching``; ``"pallas_gpu"`` cannot bound the steps of deep
        memories: give ``bounded=False`` with them.
      exchange: on a mesh that splits sequences, how the parts get each other's states:
        ``"gather"`` fetches all at once, ``"ring"`` one part's at a time, in less memory.
      dtype: dtype of the projections and of the output; by default the wider of the input's and
        ``param_dtype``, as in Flax. Memory states and gates are always float32 or wider.
      param_dtype: dtype of the parameters.
      axis_names: what the host calls the axes of parameters, its mesh's or logical names, by ours:
        ``{"embed": "fsdp", "heads": "model"}``. By default they are ``"embed"`` and ``"heads"``
        where logical rules in context have these names, and on a mesh of ``sharding.make_mesh``.
      rngs: random keys.
      host: what hosts pass to attention, such as ``kernel_init`` and ``use_bias``: see
        ``HostOptions``.

    Raises:
      TypeError: for an unknown keyword.
      ValueError: if ``num_heads`` does not divide ``in_features`` and no ``head_dim`` is given, if
        the memory's chunk size does not divide the segment size, for an unknown ``start`` or
        ``exchange``, or for what a host asks for and the layer does not do.

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
        bounded: bool = True,
        implementation: Implementation | None = None,
        exchange: Exchange = "gather",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        axis_names: AxisNames | None = None,
        rngs: nnx.Rngs,
        **host: Unpack[HostOptions],
    ) -> None:
        check_layer(memory, aggregation, segmentation, start, connector, implementation, exchange)
        memory = memory.bounded() if _checks.check_flag("bounded", bounded) else memory
        distances = _checks.check_integer("distances", distances, 2)
        conv_width = _checks.check_integer("conv_width", conv_width)
        _checks.check_dtype("dtype", dtype, optional=True)
        _checks.check_dtype("param_dtype", param_dtype)
        in_features, num_heads = _checks.check_sizes(in_features=in_features, num_heads=num_heads)
        name = type(self).__name__
        head_dim, projections = read_host_options(name, in_features, num_heads, head_dim, **host)
        with naming(axis_names):
            super().__init__(
                in_features,
                num_heads,
                memory=memory,
                aggregation=aggregation,
                head_dim=head_dim,
                connector=connector,
                distances=distances,
                conv_width=conv_width,
                dtype=dtype,
                param_dtype=param_dtype,
                options_of=projections,
                rngs=rngs,
            )
        self.segmentation = segmentation
        self.start: Start = start
        self.implementation: Implementation | None = implementation
        self.exchange: Exchange = exchange

    @overload
    def __call__(
        self,
        x: Array | None = None,
        document_ids: Array | None = None,
        inputs_v: Array | None = None,
        *,
        cache: None = None,
        **call: Unpack[MixerCall],
    ) -> Array: ...

    @overload
    def __call__(
        self,
        x: Array | None = None,
        document_ids: Array | None = None,
        inputs_v: Array | None = None,
        *,
        cache: LayerCache,
        **call: Unpack[MixerCall],
    ) -> tuple[Array, LayerCache]: ...

    def __call__(
        self,
        x: Float[Array, "b t d"] | None = None,
        document_ids: Int[Array, "b t"] | Float[Array, "b t d"] | None = None,
        inputs_v: Float[Array, "b t d"] | None = None,
        *,
        cache: LayerCache | None = None,
        **call: Unpack[MixerCall],
    ) -> Any:
        """Mixes tokens causally.

        Args:
          x: the input; t need not be a multiple of the segment size.
          document_ids: for documents packed into one sequence, an id per token: no document sees
            another.
          inputs_v: None or x, and ``document_ids`` may be x, for hosts that call attention so.
          cache: continues a stream, as ``extend`` does.
          call: what hosts pass to attention, such as ``segment_ids``, ``positions`` (also of rows
            padded on the left), ``mask`` and ``deterministic``: see ``MixerCall``.

        Returns:
          The output, of x's shape, in ``dtype``; with a cache, also the cache after these tokens.
          Where a traced mask or traced positions ask for what the layer does not do, NaN.

        Raises:
          ValueError: for an input that is not (b, t, in_features), document_ids that are not
            integers (b, t), both document_ids and a cache, or what a memory cannot follow, such as
            masks that are not causal within documents.
        """
        x, read = read_mixer_call(
            x, document_ids, inputs_v, self.num_heads, self.in_features, **call
        )
        if cache is not None:
            _checks.check_cache(cache, LayerCache, (self.num_heads, self.head_dim))
        return answer(read, x, cache, whole=self._whole, extend=self.extend)

    def _whole(
        self, x: Float[Array, "b t d"], document_ids: Int[Array, "b t"] | None
    ) -> Float[Array, "b t d"]:
        wide = x if self.dtype is None else x.astype(self.dtype)
        if 0 in x.shape[:2]:
            return self.out(self.value(wide))
        y = memory_caching(
            **self.operands(x, document_ids),
            **self._rules,
            document_ids=document_ids,
            implementation=self.implementation,
            exchange=self.exchange,
        )
        return self._output(wide, y)

    def gates(self, x: Float[Array, "b t d"]) -> Float[Array, "b t h states"]:
        """The weight that each token gives to each state it may read, for inspection.

        In float32 or wider: one per cached state of ``segmentation.plan(t).buckets``, in that
        order, then the live state's. It is 0 for states that a token does not read; ``Residual``
        weighs all others with 1.

        Example:
          >>> import jax.numpy as jnp, memcache_jax as mc
          >>> from flax import nnx
          >>> layer = mc.nn.MemoryCaching(8, 2, memory=mc.memories.SSD(),
          ...                             aggregation=mc.SSC(top_k=1), segmentation=mc.Constant(4),
          ...                             rngs=nnx.Rngs(0))
          >>> gates = layer.gates(jnp.ones((1, 14, 8)))  # 3 cached states and the live one
          >>> gates.shape, (gates > 0).sum(axis=-1)[0, ::4, 0].tolist()
          ((1, 14, 2, 4), [1, 2, 2, 2])
        """
        operands = self.operands(x)
        rows = operands["key"], operands["connector"]
        gates = functools.partial(
            gates_of_tokens, aggregation=self.aggregation, segmentation=self.segmentation
        )
        division = Division.of(*((row, "b t h .") for row in rows))
        if division is None:
            return gates(*rows)
        return division.whole("t").run(gates, rows, ("b t h .", "b t h ."), "b t h .")

    def init_cache(
        self,
        batch_size: int,
        max_length: int | None = None,
        *,
        sharding: NamedSharding | PartitionSpec | None = None,
        **options: Any,
    ) -> LayerCache:
        """Returns an empty cache for ``extend``.

        Args:
          batch_size: number of rows.
          max_length: most tokens per row; None if ``options`` bound the memory instead.
          sharding: how rows and heads are divided, as in ``mc.init_cache``.
          options: ``max_segments``, ``policy``, ``cache_dtype`` and ``placement`` of
            ``mc.init_cache``.

        Raises:
          ValueError: as ``mc.init_cache``.
        """
        batch_size = _checks.check_integer("batch_size", batch_size)
        check_options(options)
        dtype = self.param_dtype if self.dtype is None else self.dtype

        def empty() -> LayerCache:
            cache = init_cache(
                batch_size,
                self.num_heads,
                self.head_dim,
                self.head_dim,
                **self._rules,
                weights=self._initial_weights(),
                max_length=max_length,
                dtype=jnp.promote_types(self.param_dtype, jnp.float32),
                **options,
            )
            tails = tuple(conv.init_tail(batch_size, dtype) for _, conv in self._paths)
            return LayerCache(cache, tails)

        return placed(empty, sharding)

    def extend(
        self, x: Float[Array, "b t d"], cache: LayerCache, lengths: Int[Array, "b"] | None = None
    ) -> tuple[Float[Array, "b t d"], LayerCache]:
        """Continues a stream: its outputs are those of one call on the whole sequence.

        Args:
          x: the next tokens, any number of them.
          cache: from ``init_cache`` or the previous call.
          lengths: how many of each row's tokens count, from the first on; all by default.

        Returns:
          The outputs, and the cache after these tokens.

        Raises:
          ValueError: for an input that is not (b, t, in_features) or exceeds the cache's rows or
            room, or for another layer's cache.
        """
        _checks.check_input(x, self.in_features)
        _checks.check_cache(cache, LayerCache, (self.num_heads, self.head_dim))
        x = x if self.dtype is None else x.astype(self.dtype)
        rows = [linear(x) for linear, _ in self._paths]
        tokens: Any = *((row, "b . h") for row in rows), (cache.tails[0], "b . h")
        division = Division.of(*tokens, heads=self.num_heads)
        counts = jnp.full(len(x), x.shape[1])
        if lengths is not None:
            lengths = counts = jnp.asarray(_checks.check_lengths(lengths, x.shape[:2]))
        paths = zip(self._paths, rows, cache.tails, strict=True)
        new = [conv.extend(row, tail, counts, division) for (_, conv), row, tail in paths]
        (query, key, value), tails = zip(*new, strict=True)
        y, memory = extend(
            cache.memory,
            **self._tokens(x, query, key, value, division),
            lengths=lengths,
            **self._rules,
            weights=self._initial_weights(),
        )
        return self._output(x, y), LayerCache(memory, tails)

    @property
    def _rules(self) -> dict[str, Any]:
        return dict(
            memory=self.memory,
            aggregation=self.aggregation,
            segmentation=self.segmentation,
            start=self.start,
        )
