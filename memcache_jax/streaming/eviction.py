"""Policies that make room for another state where all slots of a cache are full."""

import abc
import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memcache_jax._typing import Array, Bool, Float, Int


class Kept(NamedTuple):
    """The states in the slots of each row.

    Attributes:
      segments: how many segments a state stands for, 0 for an empty slot.
      newest: the last of them.
      gates: the sum of the gates with which tokens of all heads have read it, if the policy
        ``counts_reads``.
    """

    segments: Int[Array, "b slots"]
    newest: Int[Array, "b slots"]
    gates: Float[Array, "b slots"]


class Merge(NamedTuple):
    """Two states that become one, weighted by the segments they stand for.

    Attributes:
      into: the slot of one, which gets the mean; the number of slots where nothing merges.
      other: the slot of the other; the number of slots for the new state.
      of_into: segments that the first one stands for.
      segments: segments that both stand for.
      newest: the last of these.
    """

    into: Int[Array, "b"]
    other: Int[Array, "b"]
    of_into: Int[Array, "b"]
    segments: Int[Array, "b"]
    newest: Int[Array, "b"]


class Eviction(abc.ABC):
    """Which state goes where all slots are full and a new one ends.

    A new policy is a frozen dataclass that implements ``worth``, and a name in ``POLICIES`` if it
    is to have one.

    Attributes:
      counts_reads: whether ``Kept.gates`` is summed up.
      drops: whether a state is dropped, rather than merged with another.
    """

    counts_reads: ClassVar[bool] = False
    drops: ClassVar[bool] = True

    @abc.abstractmethod
    def worth(self, kept: Kept, block: Int[Array, "b"]) -> Float[Array, "b slots"]:
        """What each state is worth; that of least worth goes, of equal ones the oldest.

        Args:
          kept: the states, of which all slots are full.
          block: the segment that ends here.
        """

    def make_room(
        self, kept: Kept, block: Int[Array, "b"], rows: Bool[Array, "b"]
    ) -> tuple[Kept, Int[Array, "b"], Merge | None]:
        """Makes room in the marked rows.

        Returns:
          The states that stay, the slot for the new one, and which two are to be merged before.
        """
        del rows
        worth = self.worth(kept, block)
        least = worth == worth.min(axis=1, keepdims=True)
        place = jnp.argmin(jnp.where(least, kept.newest, jnp.iinfo(jnp.int32).max), axis=1)
        return kept, place, None


@dataclasses.dataclass(frozen=True)
class DropOldest(Eviction):
    """The oldest state goes."""

    def worth(self, kept: Kept, block: Int[Array, "b"]) -> Float[Array, "b slots"]:
        """Its last segment."""
        del block
        return kept.newest.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class DropLeastRead(Eviction):
    """The state goes whose mean gate since it was cached is smallest."""

    counts_reads = True

    def worth(self, kept: Kept, block: Int[Array, "b"]) -> Float[Array, "b slots"]:
        """Its gates, per segment since it was cached."""
        return kept.gates / (block[:, None] - kept.newest)


@dataclasses.dataclass(frozen=True)
class MergeNeighbours(Eviction):
    """Two neighbours in time become one, those of the fewest segments; of equal ones the oldest."""

    drops = False

    def worth(self, kept: Kept, block: Int[Array, "b"]) -> Float[Array, "b slots"]:
        """Nothing is dropped."""
        del block
        return jnp.ones(kept.newest.shape)

    def make_room(
        self, kept: Kept, block: Int[Array, "b"], rows: Bool[Array, "b"]
    ) -> tuple[Kept, Int[Array, "b"], Merge | None]:
        """Merges in the marked rows, the new state among the neighbours."""
        segments, newest, _ = kept
        slots = segments.shape[1]
        order = jnp.pad(jnp.argsort(newest, axis=1), ((0, 0), (0, 1)), constant_values=slots)

        def in_order(values: Array, new: Array) -> Array:
            every = jnp.concatenate([values, new[:, None]], axis=1)
            return jnp.take_along_axis(every, order, axis=1)

        count, age = in_order(segments, jnp.ones_like(block)), in_order(newest, block)
        first = jnp.argmin(count[:, :-1] + count[:, 1:], axis=1)[:, None]

        def pair(values: Array) -> tuple[Array, Array]:
            one, other = (jnp.take_along_axis(values, first + i, axis=1)[:, 0] for i in (0, 1))
            return one, other

        into, other = pair(order)
        of_into, of_other = pair(count)
        into = jnp.where(rows, into, slots)
        merge = Merge(into, other, of_into, of_into + of_other, pair(age)[1])
        kept = kept._replace(
            segments=put(segments, into, merge.segments), newest=put(newest, into, merge.newest)
        )
        # The other slot is free now. Where it is the new state's, that needs none.
        return kept, other, merge


POLICIES: dict[str, Eviction | None] = {
    "error": None,
    "drop_oldest": DropOldest(),
    "drop_least_read": DropLeastRead(),
    "merge": MergeNeighbours(),
}
"""Policies by name, as in ``init_cache(policy="drop_oldest")``; ``"error"`` makes no room."""


def put(old: Array, place: Int[Array, "b"], new: Array) -> Array:
    """Puts a value into each row, none where there is no such place."""
    return jax.vmap(lambda old, place, new: old.at[place].set(new, mode="drop"))(old, place, new)
