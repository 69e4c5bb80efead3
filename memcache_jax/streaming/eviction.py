"""Policies that make room for another state in a full cache."""

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memcache_jax._typing import Array, Bool, Float, Int


class Kept(NamedTuple):
    """The states in the slots of each row.

    Attributes:
      segments: how many segments a state stands for, 0 for an empty slot.
      newest: the last of them.
      gates: the sum of its gates over all tokens and heads; None if no policy ``counts_reads``.
    """

    segments: Int[Array, "b slots"]
    newest: Int[Array, "b slots"]
    gates: Any


class Merge(NamedTuple):
    """Two neighboring states of each row that become one.

    Attributes:
      into: the slot of the older one, which gets the result; ``num_slots`` where nothing merges.
      other: the slot of the newer one; ``num_slots`` for the state that is about to be cached.
      of_into: segments of the state in ``into``.
      segments: segments of both.
    """

    into: Int[Array, "b"]
    other: Int[Array, "b"]
    of_into: Int[Array, "b"]
    segments: Int[Array, "b"]


class Eviction(abc.ABC):
    """Chooses which state a full cache gives up when a segment ends.

    A new policy is a frozen dataclass that implements ``worth``; to give it a name, add it to
    ``POLICIES``.

    Attributes:
      counts_reads: whether the policy needs ``Kept.gates``.
      drops: whether it drops states, rather than merging them.
      composes: whether two merged states become the state of one run over both, which counts once
        in its gate, rather than their mean, which counts once per segment.
    """

    counts_reads: ClassVar[bool] = False
    drops: ClassVar[bool] = True
    composes: bool = False

    @abc.abstractmethod
    def worth(self, kept: Kept, block: Int[Array, "b"]) -> Float[Array, "b slots"]:
        """What each state is worth: the one worth least is dropped, of equal ones the oldest.

        Args:
          kept: the states of full slots.
          block: the segment that ends here.
        """

    def make_room(
        self, kept: Kept, block: Int[Array, "b"], rows: Bool[Array, "b"]
    ) -> tuple[Kept, Int[Array, "b"], Merge | None]:
        """Makes room in the marked rows.

        Returns:
          The states that stay, the slot for the new one, and which two to merge first.
        """
        del rows
        worth = self.worth(kept if self.counts_reads else kept._replace(gates=None), block)
        least = worth == worth.min(axis=1, keepdims=True)
        place = jnp.argmin(jnp.where(least, kept.newest, jnp.iinfo(jnp.int32).max), axis=1)
        return kept, place, None


@dataclasses.dataclass(frozen=True)
class DropOldest(Eviction):
    """Drops the oldest state."""

    def worth(self, kept: Kept, block: Int[Array, "b"]) -> Float[Array, "b slots"]:
        """Its last segment."""
        del block
        return kept.newest.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class DropLeastRead(Eviction):
    """Drops the state with the smallest mean gate since it was cached."""

    counts_reads = True

    def worth(self, kept: Kept, block: Int[Array, "b"]) -> Float[Array, "b slots"]:
        """Its gates per segment since it was cached."""
        return kept.gates / (block[:, None] - kept.newest)


@dataclasses.dataclass(frozen=True)
class MergeNeighbours(Eviction):
    """Merges the two neighbors in time with the fewest segments; of equal ones the oldest."""

    drops = False
    composes: bool = False

    def coarseness(
        self, segments: Int[Array, "b slots"], distance: Int[Array, "b slots"]
    ) -> Float[Array, "b slots"]:
        """How coarse the state of each pair of neighbors would be: the least coarse pair merges.

        Args:
          segments: segments of both.
          distance: segments back to the end of the newer one, 1 for the last segment.
        """
        del distance
        return segments.astype(jnp.float32)

    def worth(self, kept: Kept, block: Int[Array, "b"]) -> Float[Array, "b slots"]:
        """Nothing is dropped."""
        del block
        return jnp.ones(kept.newest.shape)

    def make_room(
        self, kept: Kept, block: Int[Array, "b"], rows: Bool[Array, "b"]
    ) -> tuple[Kept, Int[Array, "b"], Merge | None]:
        """Merges in the marked rows, the new state among the neighbors."""
        segments, newest, _ = kept
        slots = segments.shape[1]
        order = jnp.pad(jnp.argsort(newest, axis=1), ((0, 0), (0, 1)), constant_values=slots)

        def in_order(values: Array, new: Array) -> Array:
            every = jnp.concatenate([values, new[:, None]], axis=1)
            return jnp.take_along_axis(every, order, axis=1)

        count, age = in_order(segments, jnp.ones_like(block)), in_order(newest, block)
        coarseness = self.coarseness(count[:, :-1] + count[:, 1:], block[:, None] + 1 - age[:, 1:])
        first = jnp.argmin(coarseness, axis=1)[:, None]

        def pair(values: Array) -> tuple[Array, Array]:
            one, other = (jnp.take_along_axis(values, first + i, axis=1)[:, 0] for i in (0, 1))
            return one, other

        into, other = pair(order)
        of_into, of_other = pair(count)
        into = jnp.where(rows, into, slots)
        merge, last = Merge(into, other, of_into, of_into + of_other), pair(age)[1]
        kept = kept._replace(
            segments=put(segments, into, merge.segments), newest=put(newest, into, last)
        )
        # The other slot is free now; if the other state is the new one, it needs no slot.
        return kept, other, merge


@dataclasses.dataclass(frozen=True)
class MergeByAge(MergeNeighbours):
    """Merges the two neighbors in time with the fewest segments for their age.

    If state i has n_i segments and ends d_i segments back, the pair with the smallest
    (n_i + n_{i+1}) / d_{i+1} merges. So states are fine for recent tokens and coarse for old ones,
    in proportion to their age once a row has many segments: N states cover c^N segments, where c
    grows slowly with the stream. With ``Logarithmic``, whose states merge as in a binary counter,
    c is 2 and N grows.
    """

    def coarseness(
        self, segments: Int[Array, "b slots"], distance: Int[Array, "b slots"]
    ) -> Float[Array, "b slots"]:
        """Segments of both, over the distance."""
        return segments / distance


POLICIES: dict[str, Eviction | None] = {
    "error": None,
    "drop_oldest": DropOldest(),
    "drop_least_read": DropLeastRead(),
    "merge": MergeNeighbours(),
    "merge_by_age": MergeByAge(),
    "compose_by_age": MergeByAge(composes=True),
}
"""Policies by name, as in ``init_cache(policy="drop_oldest")``; ``"error"`` makes no room."""


def put(old: Array, place: Int[Array, "b"], new: Array) -> Array:
    """Puts a value into each row; a place out of range drops it."""
    return jax.vmap(lambda old, place, new: old.at[place].set(new, mode="drop"))(old, place, new)
