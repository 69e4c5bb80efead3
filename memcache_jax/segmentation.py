"""How a sequence splits into segments, and which cached states each of them may read."""

import abc
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from memcache_jax._checks import check_integer, set_fields, shown


@dataclasses.dataclass(frozen=True, eq=False)
class ReadPlan:
    """The cached states of one sequence, and who reads them.

    A sequence is a row of blocks of equal size. A bucket is a run of whole blocks whose memory
    state is cached; a block reads only buckets that end before it begins. Aggregations and
    kernels take the plan and know nothing of how it was made.

    Attributes:
      block_size: tokens in a block.
      buckets: (buckets, 2) first block of each bucket, and the block after its last.
      reads: (blocks, r) the buckets that each block reads, oldest first, padded with -1.
      first: (blocks,) the first block of the segment that each block lies in.
      segment_blocks: (blocks,) the most blocks that this segment may have, also beyond the
        sequence, for ``num_keys`` above 1; None for one each.
    """

    block_size: int
    buckets: np.ndarray
    reads: np.ndarray
    first: np.ndarray
    segment_blocks: np.ndarray | None = None

    def __post_init__(self) -> None:
        set_fields(self, block_size=check_integer("block_size", self.block_size))
        for name in ("buckets", "reads", "first", "segment_blocks"):
            array = getattr(self, name)
            if name == "segment_blocks" and array is None:
                continue
            if not (isinstance(array, np.ndarray) and np.issubdtype(array.dtype, np.integer)):
                raise ValueError(f"{name} must be a NumPy array of integers, got {shown(array)}")
        blocks, count = len(self.first), len(self.buckets)
        shapes = [x.shape for x in (self.buckets, self.reads, self.first)]
        if shapes != [(count, 2), (blocks, *self.reads.shape[1:2]), (blocks,)]:
            raise ValueError(
                f"buckets, reads and first must be (buckets, 2), (blocks, r) and (blocks,), got "
                f"{', '.join(map(str, shapes))}"
            )
        sizes = self.segment_blocks
        if sizes is not None and (sizes.shape != (blocks,) or np.any(sizes < 1)):
            raise ValueError(f"segment_blocks must be {blocks} numbers above 0, got {sizes}")
        begin, end = self.buckets.T
        if np.any(begin < 0) or np.any(end <= begin) or np.any(end > blocks):
            raise ValueError(
                f"buckets must be runs of the {blocks} blocks, got {self.buckets.tolist()}"
            )
        if np.any(self.reads < -1) or np.any(self.reads >= count):
            raise ValueError(
                f"reads must be numbers of the {count} buckets, or -1, got {self.reads.tolist()}"
            )
        if np.any(self.first[begin] != begin):
            raise ValueError(f"buckets must begin where segments do, got {self.buckets.tolist()}")
        if np.any(np.append(end, 0)[self.reads] > self.first[:, None]):
            raise ValueError(
                "a block may read only buckets that end before its segment begins, got buckets "
                f"{self.buckets.tolist()} and reads {self.reads.tolist()}"
            )

    @classmethod
    def of(
        cls, size: int, reads: Sequence[Sequence[tuple[int, int]]], first: np.ndarray
    ) -> "ReadPlan":
        """The plan in which each block reads these buckets, (first block, block after the last)."""
        buckets = sorted({bucket for row in reads for bucket in row})
        place = {bucket: i for i, bucket in enumerate(buckets)}
        width = max(map(len, reads), default=0)
        table = [[place[bucket] for bucket in row] + [-1] * (width - len(row)) for row in reads]
        return cls(
            size,
            np.array(buckets, int).reshape(-1, 2),
            np.array(table, int).reshape(len(reads), width),
            first,
        )

    @property
    def num_blocks(self) -> int:
        """Blocks in the sequence, the last one perhaps not full."""
        return self.reads.shape[0]

    @property
    def begins(self) -> np.ndarray:
        """(blocks,) whether a segment begins with the block."""
        return self.first == np.arange(self.num_blocks)

    @property
    def visible(self) -> np.ndarray:
        """(blocks, r) whether a slot of ``reads`` holds a bucket."""
        return self.reads >= 0

    @property
    def distances(self) -> np.ndarray:
        """(blocks, r) segments from the end of each bucket that is read, 1 for the last one."""
        segment = np.cumsum(self.begins)
        ends = segment[self.buckets[:, 1] - 1]
        return segment[:, None] - ends[np.maximum(self.reads, 0)] if len(ends) else self.reads

    @property
    def spans_segments(self) -> np.ndarray:
        """(buckets,) whether a bucket is of several segments: no live memory ran over it alone."""
        return self.first[self.buckets[:, 1] - 1] > self.buckets[:, 0]

    @property
    def dyadic(self) -> bool:
        """Whether each bucket has 2^p blocks and begins at a multiple of them."""
        sizes = self.buckets[:, 1] - self.buckets[:, 0]
        return not np.any(sizes & (sizes - 1) | self.buckets[:, 0] % sizes)


class Segmentation(abc.ABC):
    """A way to split sequences of any length.

    A new one is a frozen dataclass with a field or property ``size``. The plan of a prefix must be
    a prefix of the plan, or outputs would depend on the sequence's length.

    Attributes:
      size: tokens in a block, which a memory's chunk size must divide.
    """

    size: int

    @abc.abstractmethod
    def plan(self, length: int) -> ReadPlan:
        """The read plan of a sequence of ``length`` tokens."""

    def span(self, segments: int) -> int:
        """Tokens in the first ``segments`` segments."""
        return check_integer("segments", segments, 0) * self.size

    @property
    def longest(self) -> int | None:
        """Tokens in the longest sequence that can be split; None for any number."""
        return None

    def _blocks(self, length: int) -> int:
        return -(-check_integer("the length of a sequence", length, 0) // self.size)


@dataclasses.dataclass(frozen=True)
class Constant(Segmentation):
    """Segments of one size: block s reads the segments 0 .. s-1 (Sec. 3 of arXiv:2602.24281).

    Attributes:
      size: tokens in a segment, C.

    Raises:
      ValueError: for a size below 1.

    Example:
      >>> import memcache_jax as mc
      >>> mc.Constant(256).plan(1000).reads.tolist()
      [[-1, -1, -1], [0, -1, -1], [0, 1, -1], [0, 1, 2]]
    """

    size: int

    def __post_init__(self) -> None:
        set_fields(self, size=check_integer("the segment size", self.size))

    def plan(self, length: int) -> ReadPlan:
        """The read plan of a sequence of ``length`` tokens."""
        blocks = np.arange(self._blocks(length))
        bucket = blocks[:-1]
        reads = np.where(bucket[None] < blocks[:, None], bucket[None], -1)
        return ReadPlan(self.size, np.stack([bucket, bucket + 1], axis=1), reads, blocks)


@dataclasses.dataclass(frozen=True)
class Logarithmic(Segmentation):
    """Buckets that double in size: block s reads at most log2 s + 1 states (Sec. 3.4).

    Block s sees the buckets of the binary expansion of s, largest first: in units of C, s = 37 sees
    [0, 32), [32, 36) and [36, 37). So no output depends on the sequence's length; the paper's
    example is the split of the prefix. A bucket's state is one run over it from the initial state
    for independent starts, the running state at its end for checkpoint starts.

    Attributes:
      size: tokens in a block, C.

    Raises:
      ValueError: for a size below 1.

    Example:
      >>> import memcache_jax as mc
      >>> plan = mc.Logarithmic(64).plan(38 * 64)
      >>> plan.buckets[plan.reads[37, :3]].tolist()
      [[0, 32], [32, 36], [36, 37]]
    """

    size: int

    def __post_init__(self) -> None:
        set_fields(self, size=check_integer("the segment size", self.size))

    def plan(self, length: int) -> ReadPlan:
        """The read plan of a sequence of ``length`` tokens."""
        blocks = self._blocks(length)
        reads = []
        for block in range(blocks):
            row, begin = [], 0
            for power in range(block.bit_length() - 1, -1, -1):
                if block >> power & 1:
                    row.append((begin, begin + (1 << power)))
                    begin += 1 << power
            reads.append(row)
        return ReadPlan.of(self.size, reads, np.arange(blocks))


@dataclasses.dataclass(frozen=True)
class Lengths(Segmentation):
    """Segments of given lengths: each reads all the earlier ones.

    Attributes:
      lengths: tokens in each segment. A sequence may be shorter than all of them together. Blocks
        have the size of their greatest common divisor, so choose multiples of some C.

    Raises:
      ValueError: for no lengths or one below 1, and, in ``plan``, for a longer sequence.

    Example:
      >>> import memcache_jax as mc
      >>> mc.Lengths((512, 256, 256)).plan(1000).buckets.tolist()
      [[0, 2], [2, 3]]
    """

    lengths: tuple[int, ...]
    size: int = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        given = self.lengths.tolist() if isinstance(self.lengths, np.ndarray) else self.lengths
        if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
            raise ValueError(f"Lengths needs a tuple of lengths, got {shown(given)}")
        lengths = tuple(check_integer("a segment's length", length) for length in given)
        if not lengths:
            raise ValueError("Lengths needs at least one segment, got none")
        set_fields(self, lengths=lengths, size=math.gcd(*lengths))

    def span(self, segments: int) -> int:
        """Tokens in the first ``segments`` segments, at most all."""
        return sum(self.lengths[: check_integer("segments", segments, 0)])

    @property
    def longest(self) -> int:
        """Tokens in all segments."""
        return sum(self.lengths)

    def plan(self, length: int) -> ReadPlan:
        """The read plan of a sequence of ``length`` tokens."""
        count = self._blocks(length)
        if length > self.longest:
            raise ValueError(f"the segments of {self} hold {self.longest} tokens, got {length}")
        borders = np.cumsum([0, *self.lengths]) // self.size
        blocks = np.arange(count)
        segment = np.searchsorted(borders, blocks, side="right") - 1
        buckets = list(zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True))
        plan = ReadPlan.of(self.size, [buckets[:s] for s in segment], borders[segment])
        return dataclasses.replace(plan, segment_blocks=np.diff(borders)[segment])


def exact_chunk(block: int, length: int, most: int) -> int:
    """A chunk length for rules that are exact for any: up to ``most``, and a divisor of the block.

    A block without a divisor of a useful size is one chunk. A sequence of one block is padded.
    """
    if length <= block:
        return min(length, most)
    best = max(size for size in range(1, min(block, most) + 1) if block % size == 0)
    return best if best * 4 >= min(block, most) else block
