"""The configuration of a cache."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from memcache_jax import _checks
from memcache_jax._typing import Array, State
from memcache_jax.aggregation import SSC, Aggregation
from memcache_jax.caching import Start, check_configuration
from memcache_jax.memories import Memory
from memcache_jax.segmentation import Constant, Segmentation
from memcache_jax.streaming import storage
from memcache_jax.streaming.eviction import POLICIES, Eviction
from memcache_jax.streaming.schedule import make_schedule
from memcache_jax.streaming.slots import Planned, Recent, Slots
from memcache_jax.streaming.storage import Placement


def check_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError unless these are options of ``init_cache`` for keeping states."""
    known = ("max_segments", "policy", "cache_dtype", "placement")
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"a cache has no options {unknown}; it has {list(known)}")


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """What a cache was made for, which ``extend`` reads from the cache.

    Attributes:
      memory: the write rule.
      aggregation: how reads become one output.
      segmentation: where states are cached.
      start: what a segment's memory begins with.
      max_length: most tokens per row; None for any number.
      max_segments: most cached states, for ``Constant`` segments; None for others.
      policy: how room is made when ``max_segments`` are cached.
      cache_dtype: dtype of cached states.
      placement: where they are kept.
    """

    memory: Memory
    aggregation: Aggregation
    segmentation: Segmentation
    start: Start
    max_length: int | None
    max_segments: int | None
    policy: str | Eviction
    cache_dtype: str
    placement: Placement

    def check_same(self, **given: Any) -> None:
        """Raises ValueError if an argument is neither None nor what the cache was made for."""
        for name, got in given.items():
            made = getattr(self, name)
            if got is not None and got != made:
                raise ValueError(f"the cache was made for {name}={made!r}, got {got!r}")

    @property
    def eviction(self) -> Eviction | None:
        """The policy itself where ``policy`` is its name."""
        return POLICIES[self.policy] if isinstance(self.policy, str) else self.policy

    @property
    def slots(self) -> Slots:
        """Which slot each state is kept in, and for how long."""
        if self.max_segments is not None:
            eviction = self.eviction
            drops = eviction is not None and eviction.drops
            by_age = drops and not self.aggregation.sums_all
            return Recent(self.max_segments, self.segmentation.size, eviction, by_age)
        return Planned(make_schedule(self.segmentation, self.max_length))

    def states(self, initial: State, first: Any = 0) -> storage.Bank:
        """The storage of cached states like this one, (h, ...), with rows from ``first`` on."""
        state = jax.eval_shape(
            lambda state: storage.pack(self.memory.matrices(state), self.cache_dtype), initial
        )
        bank = storage.HostBank if self.placement == "host" else storage.DeviceBank
        return bank(self.slots.num_slots, state, first)

    def keys(self, key_sum: Array, first: Any = 0) -> storage.DeviceBank:
        """The storage of pooled keys, with rows from ``first`` on."""
        heads, key_dim = key_sum.shape[1], key_sum.shape[-1]
        state = (jax.ShapeDtypeStruct((heads, key_dim), key_sum.dtype),)
        return storage.DeviceBank(self.slots.num_slots, state, first)


def make_config(
    memory: Memory,
    aggregation: Aggregation,
    segmentation: Segmentation,
    start: Start,
    *,
    max_length: int | None,
    max_segments: int | None,
    policy: str | Eviction,
    cache_dtype: DTypeLike,
    placement: Placement,
    dtype: DTypeLike,
) -> CacheConfig:
    """Checks the arguments of ``init_cache`` and returns what the cache is made for.

    Raises:
      ValueError: as ``init_cache``.
    """
    check_configuration(memory, aggregation, segmentation)
    _checks.check_choice("start", start, ("independent", "checkpoint"))
    _checks.check_choice("placement", placement, storage.PLACEMENTS)
    bounds = _bounds(memory, aggregation, segmentation, max_length, max_segments, policy)
    # In a narrow dtype a running mean would stop moving.
    cache_dtype = jnp.dtype(cache_dtype if bounds[-1] == policy else dtype).name
    _checks.check_choice("cache_dtype", cache_dtype, storage.CACHE_DTYPES)
    config = CacheConfig(memory, aggregation, segmentation, start, *bounds, cache_dtype, placement)
    merges = config.eviction is not None and not config.eviction.drops
    if placement == "host" and (merges or not isinstance(aggregation, SSC)):
        raise ValueError(
            "placement='host' is for SSC, which reads few states, and policies other than "
            f"'merge', got {aggregation} and policy={config.policy!r}"
        )
    return config if config.slots.num_slots else dataclasses.replace(config, placement="device")


def _bounds(
    memory: Memory,
    aggregation: Aggregation,
    segmentation: Segmentation,
    max_length: int | None,
    max_segments: int | None,
    policy: str | Eviction,
) -> tuple[int | None, int | None, str | Eviction]:
    """Returns max_length, max_segments and policy as a ``CacheConfig`` has them.

    Where merging changes no output, they are those of a single running mean.
    """
    if not isinstance(policy, Eviction):
        _checks.check_choice("policy", policy, tuple(POLICIES))
    same_size = isinstance(segmentation, Constant)
    if max_segments is not None and max_segments < (0 if policy == "error" else 1):
        raise ValueError(f"max_segments is too small for policy={policy!r}, got {max_segments}")
    if policy != "error":
        if not same_size:
            raise ValueError(
                f"policy={policy!r} is for segments of one size, Constant, got {segmentation}"
            )
        if max_segments is None:
            raise ValueError(f"policy={policy!r} needs max_segments, got none")
        return max_length, max_segments, policy
    spans = [] if max_segments is None else [segmentation.span(max_segments + 1)]
    max_length = min([*spans, *([] if max_length is None else [max_length])], default=None)
    if max_length is None:
        raise ValueError("give max_segments or max_length, got neither")
    if not same_size:
        return max_length, None, policy
    kept = -(-max_length // segmentation.size) - 1
    if kept and aggregation.merges_exactly(memory):
        return max_length, 1, "merge"
    return max_length, kept, policy
