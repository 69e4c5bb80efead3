"""Which cached states a stream keeps, and in which slots.

``Planned`` follows the tables of a read plan. ``Recent`` is for segments of one size, all of which
later tokens read: it needs no plan, so a stream may go on for ever, and where its slots are full a
policy makes room.
"""

import abc
import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Bool, Float, Int
from memcache_jax.engine.types import Selection
from memcache_jax.gating import gates_by_state
from memcache_jax.streaming.schedule import Schedule

Policy = Literal["error", "drop_oldest", "drop_least_read", "merge"]
POLICIES = ("error", "drop_oldest", "drop_least_read", "merge")


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


class Merge(NamedTuple):
    """Two states that become one, weighted by the segments they stand for.

    Attributes:
      into: (b,) the slot of one, which gets the mean; the number of slots where nothing merges.
      other: (b,) the slot of the other; the number of slots for the new state.
      of_into: (b,) segments that the first one stands for.
      segments: (b,) what both stand for.
      newest: (b,) the last of these.
    """

    into: Array
    other: Array
    of_into: Array
    segments: Array
    newest: Array


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


class Kept(NamedTuple):
    """What lies in the slots of ``Recent``, (b, slots) each.

    Attributes:
      segments: how many segments a state stands for, 0 for an empty slot.
      newest: the last of them.
      gates: the sum of the gates with which tokens of all heads have read it.
    """

    segments: Array
    newest: Array
    gates: Array


@dataclasses.dataclass(frozen=True)
class Recent(Slots):
    """Slots for segments of one size, each of which is a block.

    Attributes:
      num_slots: how many there are.
      size: tokens in a segment.
      policy: what makes room where all are full.
      by_age: whether reads are in the order of time, so that of equally relevant states SSC takes
        the older.
    """

    num_slots: int
    size: int
    policy: Policy
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
        if self.policy != "drop_least_read":
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
        """An empty slot, or that of a state that goes."""
        segments, newest = record.segments, record.newest
        empty = segments == 0
        full = ~empty.any(axis=1)
        place, merge = jnp.argmax(empty, axis=1), None
        if self.policy == "merge":
            merge = _choose_merge(segments, newest, block, full & ends)
            segments = _put(segments, merge.into, merge.segments)
            newest = _put(newest, merge.into, merge.newest)
            # Its other slot is free now. Where that is the new state, it needs none.
            place = jnp.where(full, merge.other, place)
        elif self.policy != "error":
            worth = newest.astype(jnp.float32)
            if self.policy == "drop_least_read":
                worth = record.gates / (block[:, None] - newest)
            place = jnp.where(full, _least(worth, newest), place)
        place = jnp.where(ends, place, self.num_slots)
        kept = Kept(
            _put(segments, place, jnp.ones_like(block)),
            _put(newest, place, block),
            _put(record.gates, place, jnp.zeros(len(block), jnp.float32)),
        )
        return kept, place[:, None], merge


def _put(old: Array, place: Int[Array, "b"], new: Array) -> Array:
    """A value in each row, none where there is no such place."""
    return jax.vmap(lambda old, place, new: old.at[place].set(new, mode="drop"))(old, place, new)


def _least(worth: Float[Array, "b slots"], newest: Int[Array, "b slots"]) -> Int[Array, "b"]:
    """The slot of least worth; of equal ones the oldest."""
    least = worth == worth.min(axis=1, keepdims=True)
    return jnp.argmin(jnp.where(least, newest, jnp.iinfo(jnp.int32).max), axis=1)


def _choose_merge(
    segments: Int[Array, "b slots"],
    newest: Int[Array, "b slots"],
    block: Int[Array, "b"],
    rows: Bool[Array, "b"],
) -> Merge:
    """In these rows, the two neighbours in time, the new state among them, of fewest segments.

    Of equal ones the oldest.
    """
    slots = segments.shape[1]
    order = jnp.pad(jnp.argsort(newest, axis=1), ((0, 0), (0, 1)), constant_values=slots)

    def in_order(values: Array, new: Array) -> Array:
        return jnp.take_along_axis(jnp.concatenate([values, new[:, None]], axis=1), order, axis=1)

    count, age = in_order(segments, jnp.ones_like(block)), in_order(newest, block)
    first = jnp.argmin(count[:, :-1] + count[:, 1:], axis=1)[:, None]

    def pair(values: Array) -> tuple[Array, Array]:
        one, other = (jnp.take_along_axis(values, first + i, axis=1)[:, 0] for i in (0, 1))
        return one, other

    into, other = pair(order)
    of_into, of_other = pair(count)
    return Merge(jnp.where(rows, into, slots), other, of_into, of_into + of_other, pair(age)[1])
