"""The configuration of a cache."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from memcache_jax import _checks
from memcache_jax._typing import Start
from memcache_jax.adaptive import Adaptive
from memcache_jax.aggregation import Aggregation
from memcache_jax.caching import check_configuration
from memcache_jax.memories import Memory
from memcache_jax.segmentation import Constant, Segmentation, exact_chunk
from memcache_jax.sparse import SSC
from memcache_jax.streaming import storage
from memcache_jax.streaming.eviction import POLICIES, Eviction
from memcache_jax.streaming.maps import check_keeps_maps
from memcache_jax.streaming.schedule import make_schedule
from memcache_jax.streaming.slots import Decided, Planned, Recent, Slots
from memcache_jax.tree import Tree


def check_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError unless these are options of ``init_cache`` for keeping states."""
    known = ("max_segments", "policy", "cache_dtype", "placement", "rewind", "keep_ends")
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
      policy: how a full cache makes room for another state.
      cache_dtype: dtype of cached states.
      placement: where they are kept.
      rewind: by how many tokens a row can go back.
      borrows: whether the layer reads another layer's states, so that this cache holds none.
      stays: whether no row goes back into the tokens of the next calls, in spite of ``rewind``.
    """

    memory: Memory
    aggregation: Aggregation
    segmentation: Segmentation
    start: Start
    max_length: int | None
    max_segments: int | None
    policy: str | Eviction
    cache_dtype: str
    placement: storage.Placement
    rewind: int = 0
    borrows: bool = False
    stays: bool = False

    def __post_init__(self) -> None:
        fewest = 0 if isinstance(self.policy, str) and self.policy == "error" else 1
        segments = _checks.check_integer("max_segments", self.max_segments, fewest, optional=True)
        length = _checks.check_integer("max_length", self.max_length, optional=True)
        rewind = _checks.check_integer("rewind", self.rewind, 0)
        _checks.set_fields(self, max_segments=segments, max_length=length, rewind=rewind)

    def check_same(self, **given: Any) -> None:
        """Raises ValueError if an argument is neither None nor what the cache was made for."""
        for name, got in given.items():
            made = getattr(self, name)
            if got is not None and (not isinstance(got, type(made)) or got != made):
                raise ValueError(
                    f"the cache was made for {name}={made!r}, got {_checks.shown(got)}"
                )

    @property
    def eviction(self) -> Eviction | None:
        """The policy itself where ``policy`` is its name."""
        return POLICIES[self.policy] if isinstance(self.policy, str) else self.policy

    @property
    def goes_back(self) -> int:
        """By how many tokens a row can go back into the tokens of the next calls."""
        return 0 if self.stays else self.rewind

    @property
    def slots(self) -> Slots:
        """Which slot each state is kept in, and for how long."""
        if self.max_segments is not None:
            eviction = self.eviction
            by_age = eviction is not None and not self.aggregation.sums_all
            return Recent(self.max_segments, self.segmentation.size, eviction, by_age)
        if isinstance(self.segmentation, Adaptive):
            assert self.max_length is not None  # from _bounded
            return Decided(self.segmentation, self.max_length)
        return Planned(make_schedule(self.segmentation, self.max_length))

    @property
    def spans(self) -> tuple[int, ...]:
        """The spans axis of arrays of keys, which exists if states have several keys each."""
        count = self.aggregation.num_keys
        return (count,) if count > 1 and self.slots.num_slots else ()

    @property
    def tree(self) -> Tree | None:
        """The router's tree, if there are more states than its beam holds; else None."""
        tree = getattr(self.aggregation, "router", None)
        return tree if tree is not None and tree.levels(self.slots.num_slots) else None

    @property
    def chunk(self) -> int:
        """Tokens that are written at once at most; chunks begin at multiples of it."""
        memory, block = self.memory, self.segmentation.size
        if memory.gradient_chunk is not None:
            return memory.gradient_chunk
        return exact_chunk(block, self.max_length or 2 * block, memory.largest_chunk)

    @property
    def defers(self) -> bool:
        """Whether single tokens are kept as factors, and written once their chunk is complete."""
        return self.memory.form == "descent" and self.memory.gradient_chunk != 1

    @property
    def in_parts(self) -> bool:
        """Whether several tokens of a chunk may be taken at once, by each row as many as it has.

        Rewinding into them needs the cache before each, which is known only with one key per state
        and a record that no token changes.
        """
        fills = self.memory.gradient_chunk is None and self.memory.takes_padding
        counts = self.eviction is not None and self.eviction.counts_reads
        measures = isinstance(self.segmentation, Adaptive) and self.segmentation.by != "keys"
        return (self.defers or fills) and not (
            self.goes_back and (self.spans or counts or measures)
        )

    @property
    def composes(self) -> bool:
        """Whether states of several segments follow from the maps of single ones."""
        slots = self.slots
        each = isinstance(slots, Planned) and bool(slots.schedule.begins[:, 0].all())
        several = (slots.num_tracks > 1 and each) or self.keeps_maps
        return several and self.start == "independent" and self.memory.merges

    @property
    def keeps_maps(self) -> bool:
        """Whether each cached state keeps the map of its run, so that runs can be composed."""
        eviction = self.eviction
        return eviction is not None and eviction.composes and self.start == "independent"

    def checked(self, dtype: DTypeLike) -> "CacheConfig":
        """Returns the configuration of a cache whose arithmetic is in ``dtype``.

        Bounds are completed. Where merging changes no output, they are those of a running mean.

        Raises:
          ValueError: as ``init_cache``.
        """
        check_configuration(self.memory, self.aggregation, self.segmentation, self.start)
        _checks.check_choice("placement", self.placement, storage.PLACEMENTS)
        config = self._bounded()
        if config.policy != self.policy:  # in a narrow dtype a running mean would stop moving
            config = dataclasses.replace(config, cache_dtype=jnp.dtype(dtype).name)
        _checks.check_choice("cache_dtype", config.cache_dtype, storage.CACHE_DTYPES)
        merges = config.eviction is not None and not config.eviction.drops
        if config.eviction is not None and config.eviction.composes and not merges:
            raise ValueError(f"a policy that composes needs drops=False, got {config.eviction}")
        if self.placement == "host" and (merges or not isinstance(self.aggregation, SSC)):
            raise ValueError(
                "placement='host' is for SSC, which reads few states, and policies that do not "
                f"merge, got {self.aggregation} and policy={config.policy!r}"
            )
        router = getattr(self.aggregation, "router", None)
        if router is not None and config.eviction is not None:
            raise ValueError(
                f"a router with {router} needs a cache that keeps all states, policy='error', "
                f"got {config.policy!r}"
            )
        if self.aggregation.exact and self.placement == "host":
            raise ValueError(
                "exact tokens stay on the device: they need placement='device', got "
                f"{self.aggregation} and placement={self.placement!r}"
            )
        if self.aggregation.exact and merges:
            raise ValueError(
                "exact tokens cannot be averaged: they need a policy that does not merge, got "
                f"{self.aggregation} and policy={config.policy!r}"
            )
        if config.keeps_maps:
            check_keeps_maps(self.memory, config.policy)
        return config if config.slots.num_slots else dataclasses.replace(config, placement="device")

    def _bounded(self) -> "CacheConfig":
        segmentation, max_segments, policy = self.segmentation, self.max_segments, self.policy
        known = isinstance(policy, str) and policy in POLICIES
        if not known and not isinstance(policy, Eviction):
            raise ValueError(
                f"policy must be one of {list(POLICIES)} or an instance of mc.Eviction, got "
                f"{_checks.shown(policy)}"
            )
        same_size = type(segmentation) is Constant  # which reads all segments
        if policy != "error":
            if not same_size:
                raise ValueError(
                    f"policy={policy!r} is for segments of one size, Constant, got {segmentation}"
                )
            if max_segments is None:
                raise ValueError(f"policy={policy!r} needs max_segments, got none")
            return self
        bounds = [] if self.max_length is None else [self.max_length]
        bounds += [] if max_segments is None else [segmentation.span(max_segments + 1)]
        if not bounds:
            raise ValueError("give max_segments or max_length, got neither")
        kept = -(-min(bounds) // segmentation.size) - 1 if same_size else None
        if kept and self.aggregation.merges_exactly(self.memory):
            kept, policy = 1, "merge"
        most = min(*bounds, _checks.LARGEST)
        return dataclasses.replace(self, max_length=most, max_segments=kept, policy=policy)
