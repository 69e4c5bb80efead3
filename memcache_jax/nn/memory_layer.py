"""What every layer of memory caching does, whatever makes its queries, keys and values."""

import functools
import types
from collections.abc import Mapping
from typing import Any, Unpack, overload

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from memcache_jax import _checks
from memcache_jax._typing import Array, Float, Int
from memcache_jax.adaptive import Adaptive
from memcache_jax.caching import in_group
from memcache_jax.choice import FollowingSSC
from memcache_jax.engine.gates import gates_of_tokens
from memcache_jax.engine.types import CachedStates
from memcache_jax.nn.borders import with_border
from memcache_jax.nn.calls import MixerCall, answer, read_mixer_call
from memcache_jax.nn.layer_cache import LayerCache
from memcache_jax.nn.layer_parts import LayerParts
from memcache_jax.nn.routers import noisy, sow_load
from memcache_jax.sharding.division import Division
from memcache_jax.streaming import Cache, check_options, init_cache
from memcache_jax.streaming.borders import check_keeps_ends, num_ends
from memcache_jax.streaming.extend import extend_in_group
from memcache_jax.streaming.protocol import placed
from memcache_jax.streaming.ring import Ring
from memcache_jax.streaming.tails import next_tails, tails_at_ends


class MemoryLayer(LayerParts):
    """A token mixer (b, t, d) -> (b, t, d) of memory caching: the base of such layers.

    A subclass sets the attributes of ``LayerParts``, calls ``learn_borders``, and writes the
    methods that raise ``NotImplementedError`` there.
    """

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
        self._check_own()
        return self._mix(x, document_ids, None)[0]

    def _check_own(self) -> None:
        if self.states != "own":
            raise ValueError(
                "a layer with states='previous' reads the cached states of another layer: it works "
                "only in the blocks of a LanguageModel"
            )

    def _mix(
        self,
        x: Float[Array, "b t d"],
        document_ids: Int[Array, "b t"] | None,
        first: Any,
        share: Mapping[str, Any] = types.MappingProxyType({}),
    ) -> tuple[Float[Array, "b t d"], Any, CachedStates | None]:
        """The output, what ``_tokens`` kept for it, and the states that it hands on.

        The latter two are None of an input without tokens.
        """
        wide = x if self.dtype is None else x.astype(self.dtype)
        if 0 in x.shape[:2]:
            return self._empty_output(wide), None, None
        tokens, kept = self._tokens(wide, document_ids, first)
        tokens = noisy(self, tokens)
        given = share.get("given")
        if given is not None:
            tokens |= {"connector": given.chosen} if self.follows else {}
            share = dict(given=given._replace(chosen=None))
        sow_load(self, tokens, document_ids, None if given is None else given.pooled)
        made = in_group(
            **with_border(self, tokens, wide),
            **share,
            **self._rules,
            weights=self._initial_weights(),
            document_ids=document_ids,
            implementation=self.implementation,
            exchange=self.exchange,
        )
        y, states = made if share.get("hands_on") else (made, None)
        return self._output(wide, y, kept), kept, states

    def operands(
        self,
        x: Float[Array, "b t d"],
        document_ids: Int[Array, "b t"] | None = None,
        *,
        first: Array | None = None,
    ) -> dict[str, Any]:
        """The arrays that a call passes to ``mc.memory_caching``, by argument name.

        They are ``query``, ``key``, ``value``, ``connector`` (or None), ``controls``, ``weights``
        and, for segments by scores, ``border``. ``first`` are the values of the model's first
        layer, for layers that mix them in: see ``recurrent.Path``.

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
        tokens, _ = self._tokens(x, document_ids, first)
        return with_border(self, tokens, x) | {"weights": self._initial_weights()}

    def gates(
        self, x: Float[Array, "b t d"], *, first: Array | None = None
    ) -> Float[Array, "b t h states"]:
        """The weight that each token gives to each state it may read, for inspection.

        In float32 or wider: one per cached state of ``segmentation.plan(t).buckets``, in that
        order, then the live state's. With ``Adaptive`` the states are those of each row's finished
        segments, in order. The weight is 0 for states that a token does not read; ``Residual``
        weighs all others with 1. ``first`` is as in ``operands``.

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
        self._check_own()
        operands = self.operands(x, first=first)
        rows = operands["key"], operands["connector"], operands.get("border")
        gates = functools.partial(
            gates_of_tokens, aggregation=self.aggregation, segmentation=self.segmentation
        )
        division = Division.of(*((row, "b t h .") for row in rows[:2]))
        if division is None:
            return gates(*rows)
        whole = ("t", "h") if isinstance(self.segmentation, Adaptive) else ("t",)
        letters = "b t h .", "b t h .", None if rows[2] is None else "b t h"
        return division.whole(*whole).run(gates, rows, letters, "b t h .")

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
          options: ``max_segments``, ``policy``, ``cache_dtype``, ``placement`` and ``rewind`` of
            ``mc.init_cache``. To go back, W earlier inputs of each convolution are kept too, and
            with ``keep_ends`` those at all segments' ends. These are for ``mc.rewind_to`` of a
            language model, which rereads tokens: a layer alone does nothing with them.

        Raises:
          ValueError: as ``mc.init_cache``.
        """
        batch_size = _checks.check_integer("batch_size", batch_size)
        check_options(options)
        keep_ends = _checks.check_flag("keep_ends", options.pop("keep_ends", False))
        dtype = self.param_dtype if self.dtype is None else self.dtype

        def empty() -> LayerCache:
            cache = init_cache(
                batch_size,
                self.num_heads,
                self.head_dim,
                self.value_dim,
                **self._rules,
                weights=self._initial_weights(),
                max_length=max_length,
                dtype=jnp.promote_types(self.param_dtype, jnp.float32),
                **options,
            )
            if self.states != "own":
                if keep_ends:
                    raise ValueError("a layer with states='previous' cannot keep_ends")
                cache = cache.as_borrower()
            tails, rewind = self._empty_tails(batch_size, dtype), cache.config.rewind
            past = Ring(rewind, tails).empty(batch_size) if rewind else None
            ends = None
            if keep_ends:
                check_keeps_ends(cache.config)
                if jax.tree.leaves(tails):
                    ends = Ring(num_ends(cache.config), tails).empty(batch_size)
            return LayerCache(cache, tails, past, ends=ends)

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
        self._check_own()
        return self._mix_next(x, cache, lengths, None)[:2]

    def _mix_next(
        self,
        x: Float[Array, "b t d"],
        cache: LayerCache,
        lengths: Any,
        first: Any,
        source: tuple[Cache, Array | None] | None = None,
        hands_on: bool = False,
    ) -> tuple[Float[Array, "b t d"], LayerCache, Any, Array | None]:
        """As ``extend``, what ``_next_tokens`` kept for the output, and the choice of SSC.

        ``source`` and ``hands_on`` are those of ``groups.extend_in_group``.
        """
        _checks.check_input(x, self.in_features)
        _checks.check_cache(cache, LayerCache, (self.num_heads, self.head_dim))
        x = x if self.dtype is None else x.astype(self.dtype)
        counts = jnp.full(len(x), x.shape[1])
        if lengths is not None:
            lengths = counts = jnp.asarray(_checks.check_lengths(lengths, x.shape[:2]))

        def next_tokens(counts: Array) -> tuple[tuple, Any]:
            *tokens, tails = self._next_tokens(x, cache.tails, counts, cache.position, first)
            return tuple(tokens), tails

        config, places = cache.memory.config, (cache.tails, cache.position, counts)
        where: dict[str, Any] = dict(most=x.shape[1], first=cache.first)
        ((tokens, kept), tails), past = next_tails(
            next_tokens, cache.past, config.rewind, *places, **where
        )
        every = num_ends(config), config.segmentation.size
        ends = tails_at_ends(next_tokens, cache.ends, *every, *places, **where)
        memory = cache.memory
        if source is not None:
            memory = memory.borrowing(source[0])
            tokens |= {"connector": source[1]} if self.follows else {}
        y, memory, chosen = extend_in_group(
            memory,
            **with_border(self, tokens, x),
            lengths=lengths,
            **self._rules,
            weights=self._initial_weights(),
            hands_on=hands_on,
        )
        # Weights come with every call: a cache that took them too would copy them for each token.
        memory = memory.replace(initial=cache.memory.initial)
        cache = LayerCache(memory, tails, past, cache.first, ends)
        return self._output(x, y, kept), cache, kept, chosen

    @property
    def _rules(self) -> dict[str, Any]:
        return dict(
            memory=self.memory,
            aggregation=self._followed if self.follows else self.aggregation,
            segmentation=self.segmentation,
            start=self.start,
        )

    @property
    def _followed(self) -> FollowingSSC:
        """The aggregation of a layer that follows another's choice."""
        aggregation: Any = self.aggregation
        return FollowingSSC(**vars(aggregation) | dict(router=None))
