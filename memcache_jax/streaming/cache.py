"""The cache of a stream: everything that later tokens need from earlier ones."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from memcache_jax import _checks
from memcache_jax._checks import check_weights
from memcache_jax._typing import Array, Bool, Int, Start, State
from memcache_jax.aggregation import Aggregation
from memcache_jax.memories import Memory
from memcache_jax.memories.pending import no_tokens
from memcache_jax.segmentation import Segmentation
from memcache_jax.streaming import storage
from memcache_jax.streaming.borders import borders_of, returned
from memcache_jax.streaming.config import CacheConfig
from memcache_jax.streaming.eviction import Eviction
from memcache_jax.streaming.exact import empty_recent, token_shapes
from memcache_jax.streaming.maps import map_shapes
from memcache_jax.streaming.past import Past, empty_past, rewound
from memcache_jax.streaming.protocol import MixerCache, placed, take_rows, zero_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache(MixerCache):
    """The past of a batch of streams, as a pytree whose arrays never change shape.

    A track is a run of tokens over which a state is written. Track 0 is the live segment, the
    others are buckets of several segments.

    Attributes:
      initial: the state before the first token, (h, ...).
      position: tokens taken so far by each row, (b,).
      state: the state of each track, (b, h, tracks, ...); with ``pending``, the state that the
        current chunk began with.
      anchor: the states at the start of the current chunk, for rules that need them besides the
        live ones; else None.
      pending: the tokens of the current chunk so far, (b, h, tracks, ...), of a deep memory whose
        state is written once the chunk is complete; else None.
      transition: the map of the live segment's run, (b, h, 1, ...), where
        ``CacheConfig.composes``; else None.
      key_sum: the sum of each track's keys so far, (b, h, tracks, k); of each span of its run,
        (b, h, tracks, spans, k), where states have several pooled keys, as in ``pooled``.
      record: what each slot holds.
      recent: the tokens of the live segment, some of which will be kept beside its state, if the
        aggregation has ``exact`` tokens; else None.
      bank: matrices of the cached states, (b, h, slots, in, out), in ``cache_dtype``, and after
        them what is kept beside each: the keys and values of tokens, (b, h, slots, exact, k or v),
        or the map of its run, where a policy composes; for their layout on the host see
        ``storage.HostStorage``.
      pooled: pooled keys of the cached states, (b, h, slots, k), and after them those of the nodes
        of a router's ``Tree``.
      past: what ``rewind`` needs; None where rows cannot go back.
      rewindable: by how many tokens each row can go back, (b,); None likewise.
      first: this layer's number in a stack of layers, which share ``bank``, ``pooled`` and
        ``past``.
      config: what the cache was made for.
    """

    # Any: under transformations the same tree holds shapes, shardings, or arrays of more axes.
    initial: Any
    position: Any
    state: Any
    anchor: Any
    pending: Any
    transition: Any
    key_sum: Any
    record: Any
    recent: Any
    bank: Any
    pooled: Any
    past: Any
    rewindable: Any
    first: Any
    config: CacheConfig = dataclasses.field(metadata=dict(static=True))

    common = ("initial",)
    small = (
        *("position", "state", "anchor", "pending", "transition", "key_sum", "record", "recent"),
        "rewindable",
    )
    shared = ("bank", "pooled", "past")
    zeroed = (
        "position",
        "record",
        "rewindable",
    )  # a segment's first token resets states, sums and factors; older tokens are masked
    axes = dict.fromkeys(
        ("state", "anchor", "pending", "transition", "key_sum", "recent", "bank", "pooled"), "b h"
    ) | {"initial": "h"}

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Number of heads h, and their key and value dimensions k and v."""
        heads, key_dim = self.key_sum.shape[1], self.key_sum.shape[-1]
        return heads, key_dim, self.config.memory.matrices(self.initial)[-1].shape[-1]

    def with_weights(self, weights: Mapping[str, Array]) -> "Cache":
        """Returns the cache with other initial weights for segments that begin from here on."""
        dtype = self.key_sum.dtype
        initial = _initial(self.config.memory, weights, *self.sizes, dtype)
        return dataclasses.replace(self, initial=initial)

    @property
    def storages(self) -> tuple[storage.Storage, storage.Storage]:
        """How ``bank`` and ``pooled`` store the cached states and their pooled keys."""
        config, first = self.config, self.first
        matrices, dtype = jax.eval_shape(config.memory.matrices, self.initial), self.key_sum.dtype
        beside = (
            *token_shapes(config, *self.sizes, dtype=dtype),
            *map_shapes(config, *self.sizes, dtype=dtype),
        )
        matrices = jax.eval_shape(
            lambda x: storage.pack(x, config.cache_dtype), (*matrices, *beside)
        )
        sums = self.key_sum
        key = jax.ShapeDtypeStruct((sums.shape[1], *sums.shape[3:]), sums.dtype)
        bank = storage.HostStorage if config.placement == "host" else storage.Storage
        slots = keys = config.slots.num_slots
        if config.tree is not None:
            keys = config.tree.offsets(slots)[-1]
        return bank(slots, matrices, first), storage.Storage(keys, key, first)

    def as_borrower(self) -> "Cache":
        """Returns the empty cache of a layer that reads another layer's states and holds none.

        Raises:
          ValueError: for a policy other than ``"error"``, or a ``rewind`` other than 0.
        """
        config = self.config
        if config.eviction is not None or config.rewind:
            raise ValueError(
                "layers with states='previous' need a cache with policy='error' and rewind=0, got "
                f"policy={config.policy!r} and rewind={config.rewind}"
            )
        return dataclasses.replace(self, config=dataclasses.replace(config, borrows=True)).alone()

    def borrowing(self, other: "Cache") -> "Cache":
        """Returns the cache with the states of another layer that has taken the same tokens.

        Tokens read the states of segments that ended before their own.
        """
        changes = dict(borrows=True, aggregation=self.config.aggregation)
        assert self.config == dataclasses.replace(other.config, **changes)
        return dataclasses.replace(
            self, record=other.record, bank=other.bank, pooled=other.pooled, first=other.first
        )

    def alone(self) -> "Cache":
        """Returns the cache without the states that it borrows."""
        if not self.config.borrows:
            return self
        return dataclasses.replace(self, record=None, bank=None, pooled=None, first=None)

    def letters(self, layers: bool = False) -> "Cache":
        """As ``MixerCache.letters``; on the host, a bank has heads and rows in one axis."""
        cache = super().letters(layers)
        if self.past is not None:
            stack = ". " if layers or self._in_stack else ""
            given = zip(Past.LETTERS, self.past, strict=True)
            cache = cache.replace(
                past=Past(*(None if x is None else stack + axes for axes, x in given))
            )
        if self.config.placement != "host" or self.bank is None:
            return cache
        return cache.replace(bank=cache.bank.replace("b h", "b"))

    def empty_states(self, rows: int, *layers: int) -> tuple:
        """Allocates empty cached states and pooled keys, for a stack of so many layers."""
        if self.config.borrows:
            return None, None, None
        past = empty_past(self, rows, *layers) if self.config.rewind else None
        return *(bank.empty(rows, *layers) for bank in self.storages), past

    def reset_states(self, rows: Array, axis: int = 0) -> tuple:
        """Returns both with the marked rows zeroed, except a bank on the host."""
        # A NaN on the host does no harm: SSC does not read states that it does not select.
        bank = self.bank if self.config.placement == "host" else zero_rows(self.bank, rows, axis)
        return bank, *zero_rows((self.pooled, self.past), rows, axis)

    def take_states(self, rows: Array, axis: int = 0) -> tuple:
        """Returns these rows of both."""
        bank = self.storages[0].take_rows(self.bank, rows, axis)
        return bank, *take_rows((self.pooled, self.past), rows, axis)

    def rewound(self, tokens: Int[Array, "b"]) -> "Cache":
        """As ``MixerCache.rewound``."""
        return rewound(self, tokens)

    def borders(self, length: int) -> np.ndarray:
        """As ``MixerCache.borders``."""
        if self.config.borrows:
            raise ValueError(
                "a layer with states='previous' caches no states to go back to: mc.rewind_to needs "
                "states='own'"
            )
        return borders_of(self, length)

    def returned(
        self, position: Int[Array, "b"], rows: Bool[Array, "b"]
    ) -> tuple["Cache", Bool[Array, "b"]]:
        """As ``MixerCache.returned``."""
        return returned(self, position, rows)


def init_cache(
    batch: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    *,
    memory: Memory,
    weights: Mapping[str, Array] | None = None,
    aggregation: Aggregation,
    segmentation: Segmentation,
    start: Start = "independent",
    max_segments: int | None = None,
    max_length: int | None = None,
    policy: str | Eviction = "error",
    dtype: DTypeLike = jnp.float32,
    cache_dtype: DTypeLike | None = None,
    placement: storage.Placement = "device",
    rewind: int = 0,
    sharding: NamedSharding | PartitionSpec | None = None,
) -> Cache:
    """Returns an empty cache for ``extend``.

    Where all segments have one size, equal weight and a linear read (``Constant`` segments and
    ``Aggregation.merges_exactly``: uniform soup, or uniform gates over a memory of one layer), the
    cache is one running mean, in O(1) memory and in ``dtype``.

    Args:
      batch: number of rows.
      heads: number of heads h.
      key_dim: key dimension k of a head.
      value_dim: value dimension v of a head.
      memory: as in ``memory_caching``, like the next four.
      weights: initial weights of a deep memory by name, (h, out, in).
      aggregation: how reads become one output.
      segmentation: where states are cached.
      start: what a segment's memory begins with.
      max_segments: most cached segments. With ``policy="error"`` a row takes the tokens of one
        segment more, or ``max_length`` if that is less.
      max_length: most tokens per row, at most 2^31 - 1, where every row ends.
      policy: for ``Constant`` segments, what happens when a segment ends while ``max_segments``
        are cached. ``"error"`` raises. ``"drop_oldest"`` drops the oldest state,
        ``"drop_least_read"`` the one with the smallest mean gate. ``"merge"`` replaces the two
        neighbors in time with the fewest segments by the mean of their states and of their pooled
        keys, weighted by segments; a state of n segments counts n times in its gate.
        ``"merge_by_age"`` does so with the two with the fewest segments for their age: those with
        the smallest (n_i + n_{i+1}) / d, where d is the number of segments back to the end of the
        newer one. So states grow coarser with age, and a stream of any length fits.
        ``"compose_by_age"`` replaces the same two by the exact state of one run over both,
        A_2 B_1 + B_2 if segments map M to A M + B; it counts once, as a bucket of ``Logarithmic``.
        With independent starts this keeps the map A beside each state, k numbers per head, or k^2
        for rules that erase, and raises ValueError for memories whose runs do not compose: SWLA,
        ``Vector``, deep ones. The three that merge also do so with ``exact`` tokens.
      dtype: dtype of live states, sums and pooled keys: float32 or float64.
      cache_dtype: dtype of cached states: ``dtype`` by default, bfloat16, or int8 with a scale per
        matrix row.
      placement: where cached states are kept: on the ``"device"``, or, for ``SSC``, in ``"host"``
        memory, from which only the states that a token selects are copied.
      rewind: W, by how many tokens ``Cache.rewind`` takes a row back. It costs the memory of W live
        states and their buckets (for a deep memory with chunks, of the states and factors of the
        chunks that W tokens touch), and of one cached state for every segment's end among W tokens.
        Each token writes the live state once; calls of more tokens than a chunk take the last W up
        to a chunk at once, but write their states one by one. Going back copies one live state.
      sharding: how rows, and then heads, are divided over a mesh: ``P("data")`` or
        ``P("data", "model")``. By default ``extend`` lays the cache out as the tokens it gets.

    Returns:
      The cache, with no tokens in any row.

    Raises:
      ValueError: for sizes below 1, weights that do not fit, an unknown start, policy, dtype or
        placement, missing bounds, or a policy or placement that the segmentation or aggregation
        does not support.

    Example:
      >>> import memcache_jax as mc
      >>> cache = mc.init_cache(2, 4, 16, 16, memory=mc.memories.LinearAttention(),
      ...                       aggregation=mc.GRM(), segmentation=mc.Constant(32), max_segments=7)
      >>> cache.position.tolist(), cache.pooled.shape
      ([0, 0], (2, 4, 7, 16))
      >>> endless = mc.init_cache(2, 4, 16, 16, memory=mc.memories.GatedDeltaNet(),
      ...                         aggregation=mc.GRM(), segmentation=mc.Constant(32),
      ...                         max_segments=7, policy="compose_by_age")
      >>> [x.shape for x in endless.bank]  # states, and their maps
      [(2, 4, 7, 16, 16), (2, 4, 7, 16, 16)]
    """
    batch, heads, key_dim, value_dim = _checks.check_sizes(
        batch=batch, heads=heads, key_dim=key_dim, value_dim=value_dim
    )
    dtype = _checks.as_dtype("dtype", dtype)
    _checks.check_choice("dtype", dtype.name, ("float32", "float64"))
    cache_dtype = dtype if cache_dtype is None else _checks.as_dtype("cache_dtype", cache_dtype)
    weights = _checks.check_mapping("weights", weights)
    config = CacheConfig(
        *(memory, aggregation, segmentation, start),
        *(max_length, max_segments, policy, cache_dtype.name, placement, rewind),
    ).checked(dtype)
    check_weights(memory, weights, heads, key_dim, value_dim)
    sizes = batch, heads, key_dim, value_dim
    return placed(lambda: _empty(config, *sizes, weights, dtype), sharding)


def _empty(
    config: CacheConfig,
    batch: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    weights: Mapping[str, Array],
    dtype: DTypeLike,
) -> Cache:
    memory, slots = config.memory, config.slots
    initial = _initial(memory, weights, heads, key_dim, value_dim, dtype)

    def repeat(x: Array, count: int) -> Array:
        shape = (batch, heads, count, *x.shape[1:])
        return jnp.broadcast_to(x.reshape(1, heads, 1, *x.shape[1:]), shape)

    tracks = slots.num_tracks if config.start == "independent" else 1
    state = jax.tree.map(lambda x: repeat(x, tracks), initial)
    pending = None
    if config.defers:
        deep: Any = memory
        empty = jax.vmap(functools.partial(no_tokens, deep))(initial)
        # Zeros, as hosts make caches: a chunk's first token empties it.
        pending = jax.tree.map(lambda x: jnp.zeros_like(repeat(x, tracks)), empty)
    anchored = memory.gradient_chunk not in (None, 1) and pending is None
    transition = None
    if config.composes:
        identity = memory.identity(key_dim, jnp.dtype(dtype))
        transition = jax.tree.map(
            lambda x: jnp.broadcast_to(x[None, None, None], (batch, heads, 1, *x.shape)), identity
        )
    # Copies: an array that occurs twice, or belongs to the model, cannot be donated.
    own = functools.partial(jax.tree.map, jnp.copy)
    cache = Cache(
        initial=own(initial),
        position=jnp.zeros(batch, jnp.int32),
        state=own(state),
        anchor=own(state) if anchored else None,
        pending=own(pending),
        transition=own(transition),
        key_sum=jnp.zeros((batch, heads, slots.num_tracks, *config.spans, key_dim), dtype),
        record=own(slots.init(batch, heads, key_dim, dtype)),
        recent=empty_recent(config, batch, heads, key_dim, value_dim, dtype=dtype),
        bank=None,
        pooled=None,
        past=None,
        rewindable=jnp.zeros(batch, jnp.int32) if config.rewind else None,
        first=None,
        config=config,
    )
    return cache.with_states(cache.empty_states(batch))


def _initial(
    memory: Memory,
    weights: Mapping[str, Array],
    heads: int,
    key_dim: int,
    value_dim: int,
    dtype: DTypeLike,
) -> State:
    """The state (h, ...) before the first token, after checking the weights."""
    check_weights(memory, weights, heads, key_dim, value_dim)
    weights = {name: weight.astype(dtype) for name, weight in weights.items()}
    return jax.vmap(
        lambda weights: memory.init(weights, key_dim, value_dim, jnp.dtype(dtype)), axis_size=heads
    )(weights)
