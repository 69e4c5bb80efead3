"""Which cached states a stream keeps, and in which slots.

``Planned`` follows the tables of a read plan. ``Recent`` is for segments of one size, all of which
later tokens read: it needs no plan, so a stream may go on for ever, and where its slots are full a
policy makes room.
"""

import abc
import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Bool, Int
from memcache_jax.engine.types import Selection
from memcache_jax.gating import gates_by_state
from memcache_jax.streaming.eviction import Eviction, Kept, Merge, put
from memcache_jax.streaming.schedule import Schedule


class Reads(NamedTuple):
    """What the rows may read.

    Attributes:
      slots: (b, r), -1 for none.
      distances: (b, r) segments back to each state's end, 1 for the last one.
      segments: (b, r) how many segments each state stands for, 0 for none; None for one each.
    """

    slots: Array
    distances: Array
    segments: Array | None = None


class Slots(abc.ABC):
    """A stream's slots: what ``extend`` asks at each block (b,) of the rows.

    Attributes:
      num_slots: how many there are.
      num_tracks: runs that are written side by side, the live one first.
    """

    num_slots: int
    num_tracks: int = 1

    @property
    def reads_all(self) -> bool:
        """Whether ``reads`` has all slots, each at its own place, or -1 there."""
        return False

    def init(self, batch: int) -> Any:
        """The record of what lies where, a pytree of arrays (b, ...)."""
        del batch
        return ()

    @abc.abstractmethod
    def begins(self, block: Int[Array, "b"]) -> Bool[Array, "b tracks"]:
        """The runs that begin with the block."""

    @abc.abstractmethod
    def first(self, block: Int[Array, "b"]) -> Int[Array, "b"]:
        """The first block of the segment that the block lies in."""

    @abc.abstractmethod
    def reads(self, record: Any, block: Int[Array, "b"]) -> Reads:
        """What the block reads."""

    def count_reads(self, record: Any, selection: Selection, active: Bool[Array, "b"]) -> Any:
        """The record after the tokens of active rows have read."""
        del selection, active
        return record

    @abc.abstractmethod
    def store(
        self, record: Any, block: Int[Array, "b"], ends: Bool[Array, "b"]
    ) -> tuple[Any, Int[Array, "b tracks"], Merge | None]:
        """Room for the states that are complete where the block ends.

        Returns:
          The record after it, the slot of each track's state, or ``num_slots`` for none, and what
          is to be merged before.
        """

    @abc.abstractmethod
    def tokens(self, block: Int[Array, "b"]) -> Int[Array, "b tracks"]:
        """Tokens of the states that are complete where the block ends."""


class Planned(Slots):
    """Slots by the tables of a schedule."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.num_slots, self.num_tracks = schedule.num_slots, schedule.begins.shape[1]

    def begins(self, block: Int[Array, "b"]) -> Bool[Array, "b tracks"]:
        """The runs that begin with the block."""
        return self._row(self.schedule.begins, block)

    def first(self, block: Int[Array, "b"]) -> Int[Array, "b"]:
        """The first block of the segment that the block lies in."""
        return self._row(self.schedule.first, block)

    def reads(self, record: Any, block: Int[Array, "b"]) -> Reads:
        """What the block reads."""
        slots = self._row(self.schedule.reads, block)
        return Reads(slots, self._row(self.schedule.distances, block))

    def store(
        self, record: Any, block: Int[Array, "b"], ends: Bool[Array, "b"]
    ) -> tuple[Any, Int[Array, "b tracks"], None]:
        """Slots that are read no more, or never were."""
        stores = self._row(self.schedule.stores, block)
        return record, jnp.where(ends[:, None] & (stores >= 0), stores, self.num_slots), None

    def tokens(self, block: Int[Array, "b"]) -> Int[Array, "b tracks"]:
        """Tokens of the states that are complete where the block ends."""
        return self._row(self.schedule.tokens, block)

    def _row(self, table: np.ndarray, block: Int[Array, "b"]) -> Array:
        # A row that is full goes on in the last block.
        return jnp.asarray(table)[jnp.minimum(block, len(table) - 1)]


@dataclasses.dataclass(frozen=True)
class Recent(Slots):
    """Slots for segments of one size, each of which is a block.

    Attributes:
      num_slots: how many there are.
      size: tokens in a segment.
      eviction: what makes room where all are full; None where nothing does.
      by_age: whether reads are in the order of time, so that of equally relevant states SSC takes
        the older.
    """

    num_slots: int
    size: int
    eviction: Eviction | None
    by_age: bool = False

    @property
    def reads_all(self) -> bool:
        """Whether ``reads`` has all slots, each at its own place."""
        return not self.by_age

    def init(self, batch: int) -> Kept:
        """Empty slots."""
        empty = jnp.zeros((batch, self.num_slots), jnp.int32)
        return Kept(empty, empty, empty.astype(jnp.float32))

    def begins(self, block: Int[Array, "b"]) -> Bool[Array, "b 1"]:
        """Every block is a segment."""
        return jnp.ones((len(block), 1), bool)

    def first(self, block: Int[Array, "b"]) -> Int[Array, "b"]:
        """Every block is a segment."""
        return block

    def reads(self, record: Kept, block: Int[Array, "b"]) -> Reads:
        """All slots that are not empty."""
        full, distances = record.segments > 0, block[:, None] - record.newest
        slots = jnp.where(full, jnp.arange(self.num_slots)[None], -1)
        reads = Reads(slots, distances, record.segments)
        if not self.by_age:
            return reads
        last = jnp.iinfo(jnp.int32).max
        order = jnp.argsort(jnp.where(full, record.newest, last), axis=1)  # empty slots last
        slots, distances, segments = (
            jnp.take_along_axis(x, order, axis=1) for x in (slots, distances, record.segments)
        )
        return Reads(slots, distances, segments)

    def count_reads(self, record: Kept, selection: Selection, active: Bool[Array, "b"]) -> Kept:
        """Adds the gates up where the policy asks."""
        if self.eviction is None or not self.eviction.counts_reads:
            return record
        gates = gates_by_state(selection, self.num_slots).sum(axis=(1, 2, 3))
        gates = jnp.where(active[:, None], gates, 0)
        return record._replace(gates=record.gates + gates.astype(record.gates.dtype))

    def tokens(self, block: Int[Array, "b"]) -> Int[Array, "b 1"]:
        """A segment's."""
        return jnp.full((len(block), 1), self.size)

    def store(
        self, record: Kept, block: Int[Array, "b"], ends: Bool[Array, "b"]
    ) -> tuple[Kept, Int[Array, "b 1"], Merge | None]:
        """An empty slot, or the one that the policy frees."""
        empty = record.segments == 0
        full = ~empty.any(axis=1)
        place, merge = jnp.argmax(empty, axis=1), None
        if self.eviction is not None:
            record, room, merge = self.eviction.make_room(record, block, full & ends)
            place = jnp.where(full, room, place)
        place = jnp.where(ends, place, self.num_slots)
        kept = Kept(
            put(record.segments, place, jnp.ones_like(block)),
            put(record.newest, place, block),
            put(record.gates, place, jnp.zeros(len(block), jnp.float32)),
        )
        return kept, place[:, None], merge
