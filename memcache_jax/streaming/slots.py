"""Which cached states a stream keeps, and in which slots.

``Planned`` follows the tables of a read plan. ``Recent`` is for segments of one size, all of which
later tokens read: it needs no plan, so a stream may go on for ever, and where its slots are full a
policy makes room. ``Decided`` is for segments that end where the tokens say. All have the same
methods, which ``extend`` calls at each block (b,) of the rows.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Bool, Float, Int
from memcache_jax.adaptive import Adaptive
from memcache_jax.engine.types import Candidates, Keys, Selection
from memcache_jax.gating import gates_by_state
from memcache_jax.streaming.eviction import Eviction, Kept, Merge, put
from memcache_jax.streaming.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Planned:
    """Slots by the tables of a schedule."""

    schedule: Schedule

    @property
    def num_slots(self) -> int:
        """Number of slots."""
        return self.schedule.num_slots

    @property
    def num_tracks(self) -> int:
        """Number of runs that are written side by side, the live one first."""
        return self.schedule.begins.shape[1]

    def init(self, batch: int, heads: int, key_dim: int, dtype: Any) -> Any:
        """The record of what each slot holds, a pytree of arrays (b, ...): here none."""
        del batch, heads, key_dim, dtype
        return ()

    def begins(self, record: Any, block: Int[Array, "b"]) -> Bool[Array, "b tracks"]:
        """The runs that begin with the block."""
        return self._row(self.schedule.begins, block)

    def first(self, record: Any, block: Int[Array, "b"]) -> Int[Array, "b"]:
        """The first block of the block's segment."""
        return self._row(self.schedule.first, block)

    def candidates(
        self, record: Any, block: Int[Array, "b"], keys: Callable[[str], Keys]
    ) -> Candidates:
        """The slots that the block reads."""
        tables = self.schedule.reads, self.schedule.distances
        states, distances = (self._row(table, block)[:, None] for table in tables)
        return Candidates(states, distances, keys)

    def count_reads(self, record: Any, selection: Selection, counted: Bool[Array, "b *m"]) -> Any:
        """The record after the tokens that count have read."""
        del selection, counted
        return record

    def store(
        self,
        record: Any,
        block: Int[Array, "b"],
        ends: Bool[Array, "b"],
        key_sum: Float[Array, "b h tracks *spans k"],
    ) -> tuple[Any, Int[Array, "b tracks"], Merge | None]:
        """Makes room for the states that end with the block, in rows where ``ends``.

        Returns:
          The record afterwards, the slot of each track's state, or ``num_slots`` for none, and
          which states to merge first.
        """
        stores = self._row(self.schedule.stores, block)
        return record, jnp.where(ends[:, None] & (stores >= 0), stores, self.num_slots), None

    def returned(
        self, record: Any, now: Int[Array, "b"], then: Int[Array, "b"]
    ) -> tuple[Any, Bool[Array, "b slots"], Int[Array, "b"], Bool[Array, "b"]]:
        """Goes back from one block to the begin of another.

        Returns:
          The record there, the slots that were empty, the slot of the newest state, and in which
          rows all slots that were not empty hold what they did.
        """
        held, last = self.schedule.held, len(self.schedule.held) - 1
        now, was = (jnp.asarray(held)[jnp.clip(x, 0, last)] for x in (now, then))
        place = self._row(self.schedule.stores, jnp.maximum(then - 1, 0))[:, 0]
        return record, (now >= 0) & (was < 0), place, ((now == was) | (was < 0)).all(axis=1)

    def tokens(self, record: Any, block: Int[Array, "b"]) -> Int[Array, "b tracks"]:
        """Number of tokens of each state that ends with the block."""
        return self._row(self.schedule.tokens, block)

    def runs(self, record: Any, block: Int[Array, "b"]) -> tuple[Array, Any]:
        """The first block of the runs (b, tracks) that the block lies in, and their most blocks."""
        del record
        begin, length = (self._row(table, block) for table in self.schedule.runs)
        return begin, length

    def _row(self, table: np.ndarray, block: Int[Array, "b"]) -> Array:
        # A full row stays in the last block.
        return jnp.asarray(table)[jnp.minimum(block, len(table) - 1)]


@dataclasses.dataclass(frozen=True)
class Recent:
    """Slots for segments of one size, each of which is a block; methods as of ``Planned``.

    Attributes:
      num_slots: number of slots.
      size: tokens in a segment.
      eviction: what makes room where all slots are full; None where nothing does.
      by_age: whether to list states by age, so that of equally relevant ones SSC takes the older.
    """

    num_slots: int
    size: int
    eviction: Eviction | None
    by_age: bool = False

    num_tracks = 1

    def init(self, batch: int, heads: int, key_dim: int, dtype: Any) -> Kept:
        """Empty slots."""
        del heads, key_dim, dtype
        empty = jnp.zeros((batch, self.num_slots), jnp.int32)
        return Kept(empty, empty, empty.astype(jnp.float32))

    def begins(self, record: Any, block: Int[Array, "b"]) -> Bool[Array, "b 1"]:
        """All: each block is a segment."""
        return jnp.ones((len(block), 1), bool)

    def first(self, record: Any, block: Int[Array, "b"]) -> Int[Array, "b"]:
        """The block itself."""
        return block

    def candidates(
        self, record: Kept, block: Int[Array, "b"], keys: Callable[[str], Keys]
    ) -> Candidates:
        """All slots; an empty one counts no segment, a composed state one."""
        slots, segments = np.arange(self.num_slots)[None], record.segments
        held = segments > 0
        if self.eviction is not None and self.eviction.composes:
            segments = held.astype(segments.dtype)
        distances = block[:, None] - record.newest
        if self.by_age:
            last = jnp.iinfo(jnp.int32).max
            slots = jnp.where(held, jnp.arange(self.num_slots)[None], -1)
            order = jnp.argsort(jnp.where(held, record.newest, last), axis=1)
            slots, distances, segments = (
                jnp.take_along_axis(x, order, axis=1) for x in (slots, distances, segments)
            )
        counts = segments[:, None]
        return Candidates(slots[:, None], distances[:, None], keys, counts=counts, held=held)

    def count_reads(self, record: Kept, selection: Selection, counted: Bool[Array, "b *m"]) -> Kept:
        """Adds up gates if the policy asks for them."""
        if self.eviction is None or not self.eviction.counts_reads:
            return record
        gates = gates_by_state(selection, self.num_slots)
        gates = jnp.where(counted[:, None, None, :, None], gates, 0).sum(axis=(1, 2, 3))
        return record._replace(gates=record.gates + gates.astype(record.gates.dtype))

    def returned(
        self, record: Kept, now: Int[Array, "b"], then: Int[Array, "b"]
    ) -> tuple[Kept, Bool[Array, "b slots"], Int[Array, "b"], Bool[Array, "b"]]:
        """Goes back to the begin of an earlier segment."""
        del now
        held = record.segments > 0
        stays = held & (record.newest < then[:, None])
        kept = jax.tree.map(lambda x: jnp.where(stays, x, jnp.zeros((), x.dtype)), record)
        newest = stays & (record.newest == then[:, None] - 1)
        place = jnp.argmax(newest, axis=1)
        # As many as there were: none has been dropped since, or merged with a later one.
        whole = stays.sum(axis=1) == jnp.minimum(then, self.num_slots)
        return kept, held & ~stays, place, whole

    def tokens(self, record: Any, block: Int[Array, "b"]) -> Int[Array, "b 1"]:
        """A segment's."""
        return jnp.full((len(block), 1), self.size)

    def runs(self, record: Any, block: Int[Array, "b"]) -> tuple[Array, Any]:
        """The block itself."""
        return block[:, None], np.ones((1, 1), int)

    def store(
        self,
        record: Kept,
        block: Int[Array, "b"],
        ends: Bool[Array, "b"],
        key_sum: Float[Array, "b h tracks *spans k"],
    ) -> tuple[Kept, Int[Array, "b 1"], Merge | None]:
        """An empty slot, or the one that the policy frees; none where no policy does."""
        empty = record.segments == 0
        full = ~empty.any(axis=1)
        place, merge = jnp.argmax(empty, axis=1), None
        if self.eviction is None:  # the row ends with the block, and nothing will read its state
            ends &= ~full
        else:
            record, room, merge = self.eviction.make_room(record, block, full & ends)
            place = jnp.where(full, room, place)
        place = jnp.where(ends, place, self.num_slots)
        kept = Kept(
            put(record.segments, place, jnp.ones_like(block)),
            put(record.newest, place, block),
            put(record.gates, place, jnp.zeros(len(block), jnp.float32)),
        )
        return kept, place[:, None], merge


class Ended(NamedTuple):
    """The segments of each row so far.

    Attributes:
      segments: those that ended; the i-th is in slot i.
      first: the block with which the live one began.
      before: the sum of its blocks' measures before the current block.
      own: the sum of the measures of the current block's tokens; None by keys, whose sum is in the
        cache.
    """

    segments: Int[Array, "b"]
    first: Int[Array, "b"]
    before: Float[Array, "b *measure"]
    own: Float[Array, "b"] | None = None


@dataclasses.dataclass(frozen=True)
class Decided:
    """A slot for each segment that may end among so many tokens, which decide where."""

    segmentation: Adaptive
    length: int

    @property
    def num_slots(self) -> int:
        """Number of slots."""
        return self.segmentation.most_states(self.length)

    num_tracks = 1

    def init(self, batch: int, heads: int, key_dim: int, dtype: Any) -> Ended:
        """No segment."""
        empty = jnp.zeros(batch, jnp.int32)
        if self.segmentation.by == "keys":
            return Ended(empty, empty, jnp.zeros((batch, heads, key_dim), dtype))
        return Ended(empty, empty, *(jnp.zeros(batch, dtype) for _ in range(2)))

    def measured(self, record: Ended, measures: Float[Array, "b m"]) -> Ended:
        """The record with the measures of more tokens of the current block, by errors or scores."""
        assert record.own is not None
        return record._replace(own=record.own + measures.sum(axis=1))

    def begins(self, record: Ended, block: Int[Array, "b"]) -> Bool[Array, "b 1"]:
        """Whether the segment before ended with the block before."""
        return (record.first == block)[:, None]

    def first(self, record: Ended, block: Int[Array, "b"]) -> Int[Array, "b"]:
        """As the record says."""
        del block
        return record.first

    def candidates(
        self, record: Ended, block: Int[Array, "b"], keys: Callable[[str], Keys]
    ) -> Candidates:
        """The slots of the segments that ended."""
        del block
        slot = jnp.arange(self.num_slots)[None, None]
        distances = record.segments[:, None, None] - slot
        return Candidates(jnp.where(distances > 0, slot, -1), distances, keys)

    def count_reads(
        self, record: Ended, selection: Selection, counted: Bool[Array, "b *m"]
    ) -> Ended:
        """Unchanged."""
        del selection, counted
        return record

    def tokens(self, record: Ended, block: Int[Array, "b"]) -> Int[Array, "b 1"]:
        """Those of the live segment up to the block's end."""
        return ((block + 1 - record.first) * self.segmentation.size)[:, None]

    def runs(self, record: Ended, block: Int[Array, "b"]) -> tuple[Array, Any]:
        """The live segment."""
        del block
        most = self.segmentation.max // self.segmentation.size
        return record.first[:, None], np.full((1, 1), most)

    def store(
        self,
        record: Ended,
        block: Int[Array, "b"],
        ends: Bool[Array, "b"],
        key_sum: Float[Array, "b h tracks *spans k"],
    ) -> tuple[Ended, Int[Array, "b 1"], Merge | None]:
        """The next slot if the segment ends with the block."""
        if record.own is None:
            total = key_sum.reshape(*key_sum.shape[:2], -1, key_sum.shape[-1]).sum(axis=2)
            own = total - record.before
        else:
            own = record.own / self.segmentation.size
            total = record.before + own
        closes = ends & self.segmentation.ends(block - record.first, record.before, own)
        place = jnp.where(closes, record.segments, self.num_slots)
        closed, whole = (x.reshape(-1, *[1] * (own.ndim - 1)) for x in (closes, ends))
        before = jnp.where(whole, total, record.before)
        kept = Ended(
            record.segments + closes,
            jnp.where(closes, block + 1, record.first),
            jnp.where(closed, 0, before),
            None if record.own is None else jnp.where(ends, 0, record.own),
        )
        return kept, place[:, None], None


Slots: TypeAlias = Planned | Recent | Decided
