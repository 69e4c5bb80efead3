"""Caches: what later tokens of a stream need of earlier ones."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from memcache_jax import _checks
from memcache_jax._arguments import check_weights
from memcache_jax._typing import Array, State
from memcache_jax.aggregation import Aggregation
from memcache_jax.caching import Start
from memcache_jax.memories import Memory
from memcache_jax.segmentation import Segmentation
from memcache_jax.streaming.config import CacheConfig, make_config
from memcache_jax.streaming.protocol import MixerCache, take_rows, zero_rows
from memcache_jax.streaming.slots import Policy
from memcache_jax.streaming.storage import Placement


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache(MixerCache):
    """A stream's past, row by row, as a pytree whose arrays never change their shapes.

    A track is a run of tokens over which a state is written: that of track 0 is the live one, and
    others are buckets of several segments.

    Attributes:
      initial: the state before the first token, (h, ...).
      position: tokens that each row has taken, (b,).
      state: the state of each track, (b, h, tracks, ...).
      anchor: the states with which the current chunk began; None for rules exact for any chunk.
      key_sum: the sum of each track's keys since it began, (b, h, tracks, k).
      record: what each slot holds.
      bank: matrices of the cached states, (b, h, slots, in, out), in ``cache_dtype``; on the host
        in one axis, see ``storage``.
      pooled: pooled keys of the cached states, (b, h, slots, k).
      first: in a stack of layers, which share ``bank`` and ``pooled``, the first row of this one.
      config: what the cache was made for.
    """

    # Not checked: trees of the same form hold other things than arrays, or more axes.
    initial: Any
    position: Any
    state: Any
    anchor: Any
    key_sum: Any
    record: Any
    bank: Any
    pooled: Any
    first: Any
    config: CacheConfig = dataclasses.field(metadata=dict(static=True))

    common = ("initial",)
    small = ("position", "state", "anchor", "key_sum", "record")
    shared = ("bank", "pooled")
    zeroed = ("position", "record")  # live states and sums begin anew with the first token

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Heads h, and their key and value dimensions k and v."""
        _, heads, _, key_dim = self.key_sum.shape
        return heads, key_dim, self.config.memory.matrices(self.initial)[-1].shape[-1]

    def with_weights(self, weights: Mapping[str, Array]) -> "Cache":
        """The cache whose later segments begin with these weights of a deep memory."""
        dtype = self.key_sum.dtype
        initial = _initial(self.config.memory, weights, *self.sizes, dtype)
        return dataclasses.replace(self, initial=initial)

    # The bank's storage knows how its arrays lie.

    def empty_states(self, rows: int) -> tuple:
        """Allocates ``rows`` rows of empty cached states and pooled keys."""
        bank, keys = self.config.states(self.initial), self.config.keys(self.key_sum)
        return bank.empty(rows), keys.empty(rows)[0]

    def reset_states(self, rows: Array) -> tuple:
        """Both with the marked rows zeroed, but for a bank on the host."""
        # On the host a NaN does no harm: states that SSC does not select are not read.
        bank = self.bank if self.config.placement == "host" else zero_rows(self.bank, rows)
        return bank, zero_rows(self.pooled, rows)

    def take_states(self, rows: Array) -> tuple:
        """These rows of both, counted over all layers."""
        bank = self.config.states(self.initial).take_rows(self.bank, rows)
        return bank, take_rows(self.pooled, rows)


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
    policy: Policy = "error",
    dtype: DTypeLike = jnp.float32,
    cache_dtype: DTypeLike | None = None,
    placement: Placement = "device",
) -> Cache:
    """An empty cache for ``extend``.

    Where each segment counts the same and is read linearly (``Aggregation.merges_exactly``: uniform
    soup, or the uniform gates of a memory of one layer) segments of one size are kept as one
    running mean, in O(1), in ``dtype``.

    Args:
      batch: rows.
      heads: heads h.
      key_dim: key dimension k of a head.
      value_dim: value dimension v of a head.
      memory: as for ``memory_caching``, and so are the next four.
      weights: initial weights of a deep memory by name, (h, out, in).
      aggregation: how reads become one output.
      segmentation: where states are cached.
      start: what a segment's memory begins with.
      max_segments: segments that may be cached. With ``policy="error"`` a row takes the tokens of
        one more, or ``max_length`` where that is given too and less, or alone.
      max_length: tokens of a row.
      policy: for segments of one size, what happens where ``max_segments`` are cached and another
        ends: ``"error"``; the state of the oldest goes, ``"drop_oldest"``; that of the one whose
        mean gate was smallest, ``"drop_least_read"``; or two neighbours in time, those of the
        fewest tokens, become one, ``"merge"``: the mean of their states and of their pooled keys,
        weighted by tokens. A state of n segments counts n times in its gate.
      dtype: of live states, sums and pooled keys: float32 or float64.
      cache_dtype: of cached states: by default ``dtype``; or bfloat16, or int8 with a scale for
        each row of a matrix.
      placement: where cached states are, on the ``"device"`` or, for ``SSC``, in the memory of the
        ``"host"``, from which only the states that a token selects are brought in.

    Returns:
      The cache, with no token in any row.

    Raises:
      ValueError: for sizes below 1, weights that do not fit, an unknown start, policy, dtype or
        placement, bounds that are missing, or a policy, or a placement, for which the segments, or
        the aggregation, are not made.

    Example:
      >>> import memcache_jax as mc
      >>> cache = mc.init_cache(2, 4, 16, 16, memory=mc.memories.LinearAttention(),
      ...                       aggregation=mc.GRM(), segmentation=mc.Constant(32), max_segments=7)
      >>> cache.position.tolist(), cache.pooled.shape
      ([0, 0], (2, 4, 7, 16))
    """
    _checks.check_sizes(
        batch=batch, heads=heads, key_dim=key_dim, value_dim=value_dim, max_length=max_length
    )
    _checks.check_choice("dtype", jnp.dtype(dtype).name, ("float32", "float64"))
    config = make_config(
        memory,
        aggregation,
        segmentation,
        start,
        max_length=max_length,
        max_segments=max_segments,
        policy=policy,
        cache_dtype=dtype if cache_dtype is None else cache_dtype,
        placement=placement,
        dtype=dtype,
    )
    initial = _initial(memory, weights or {}, heads, key_dim, value_dim, dtype)
    slots = config.slots

    def repeat(x: Array, count: int) -> Array:
        shape = (batch, heads, count, *x.shape[1:])
        return jnp.broadcast_to(x.reshape(1, heads, 1, *x.shape[1:]), shape)

    tracks = slots.num_tracks if start == "independent" else 1
    state = jax.tree.map(lambda x: repeat(x, tracks), initial)
    # Copies: an array that occurs twice, or is the model's too, cannot be donated.
    own = functools.partial(jax.tree.map, jnp.copy)
    cache = Cache(
        initial=own(initial),
        position=jnp.zeros(batch, jnp.int32),
        state=own(state),
        anchor=own(state) if memory.gradient_chunk else None,
        key_sum=jnp.zeros((batch, heads, slots.num_tracks, key_dim), dtype),
        record=own(slots.init(batch)),
        bank=None,
        pooled=None,
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
    """The state (h, ...) before the first token, of weights that are checked."""
    check_weights(memory, weights, heads, key_dim, value_dim)
    weights = {name: weight.astype(dtype) for name, weight in weights.items()}
    return jax.vmap(
        lambda weights: memory.init(weights, key_dim, value_dim, jnp.dtype(dtype)), axis_size=heads
    )(weights)
