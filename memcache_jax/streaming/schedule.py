"""When a stream begins, stores and reads the states of a read plan."""

import dataclasses
import functools
import heapq

import numpy as np

from memcache_jax.segmentation import Segmentation


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """What to do at each block of a stream.

    A track is a run of blocks over which a state is written; track 0 is the live segment, and the
    others are the buckets of several segments that a block lies in. A slot holds a cached state
    until its last read, and then another.

    Attributes:
      begins: (blocks, tracks) whether a run begins with the block.
      stores: (blocks, tracks) the slot of the bucket that ends with the block, -1 for none.
      tokens: (blocks, tracks) tokens of that bucket, 1 for none.
      reads: (blocks, r) the slots that the block reads, oldest first, padded with -1.
      distances: (blocks, r) as a plan's.
      first: (blocks,) as a plan's.
      num_slots: slots in all.
      segment_blocks: (blocks,) as a plan's.
    """

    begins: np.ndarray
    stores: np.ndarray
    tokens: np.ndarray
    reads: np.ndarray
    distances: np.ndarray
    first: np.ndarray
    num_slots: int
    segment_blocks: np.ndarray | None

    @functools.cached_property
    def held(self) -> np.ndarray:
        """(blocks + 1, slots) the block whose end left its state in each slot, before each block.

        -1 for an empty slot.
        """
        held = np.full((len(self.stores) + 1, self.num_slots), -1)
        for block, slots in enumerate(self.stores):
            held[block + 1] = held[block]
            held[block + 1, slots[slots >= 0]] = block
        return held

    @functools.cached_property
    def runs(self) -> tuple[np.ndarray, np.ndarray]:
        """(blocks, tracks) the first block and the length of the run that a block lies in.

        Where a track has no run, the numbers are arbitrary.
        """
        count = len(self.begins)
        block = np.arange(count)[:, None]
        begin = np.maximum.accumulate(np.where(self.begins, block, 0), axis=0)
        after = np.where(self.stores >= 0, block + 1, count)
        length = np.minimum.accumulate(after[::-1], axis=0)[::-1] - begin
        # Some segments are never stored alone.
        length[:, 0] = 1 if self.segment_blocks is None else self.segment_blocks
        return begin, length


@functools.lru_cache(maxsize=64)
def make_schedule(segmentation: Segmentation, length: int) -> Schedule:
    """The schedule of a stream of at most ``length`` tokens."""
    plan = segmentation.plan(length)
    after, until = plan.buckets[:, 1], np.zeros(len(plan.buckets), int)
    readers, _ = np.nonzero(plan.visible)
    np.maximum.at(until, plan.reads[plan.visible], readers)
    slot = _places(after, until + 1)
    track = np.zeros(len(after), int)
    (spans,) = np.nonzero(plan.spans_segments)
    track[spans] = 1 + _places(plan.buckets[spans, 0], after[spans])
    shape = (plan.num_blocks, 1 + track.max(initial=0))
    begins, stores, tokens = np.zeros(shape, bool), np.full(shape, -1), np.ones(shape, int)
    begins[:, 0] = plan.begins
    begins[plan.buckets[spans, 0], track[spans]] = True
    if len({*zip(after.tolist(), track.tolist(), strict=True)}) < len(after):
        raise ValueError(f"in a stream states must end at distinct tokens, got {segmentation}")
    stores[after - 1, track] = slot
    tokens[after - 1, track] = (after - plan.buckets[:, 0]) * plan.block_size
    reads = np.where(plan.visible, np.append(slot, -1)[plan.reads], -1)
    num_slots = int(1 + slot.max(initial=-1))
    tables = begins, stores, tokens, reads, plan.distances, plan.first
    return Schedule(*tables, num_slots, plan.segment_blocks)


def _places(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Assigns intervals [begin, end) to the fewest places in which no two overlap."""
    place = np.zeros(len(begin), int)
    taken: list[tuple[int, int]] = []  # (end, place)
    for i in np.argsort(begin, kind="stable"):
        free = taken and taken[0][0] <= begin[i]
        place[i] = heapq.heappop(taken)[1] if free else len(taken)
        heapq.heappush(taken, (int(end[i]), int(place[i])))
    return place
