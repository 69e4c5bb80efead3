"""How a sequence splits into segments, and which cached states each of them may read."""

import dataclasses

import numpy as np


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
    """

    block_size: int
    buckets: np.ndarray
    reads: np.ndarray

    @property
    def num_blocks(self) -> int:
        """Blocks in the sequence, the last one perhaps not full."""
        return self.reads.shape[0]

    @property
    def visible(self) -> np.ndarray:
        """(blocks, r) whether a slot of ``reads`` holds a bucket."""
        return self.reads >= 0


@dataclasses.dataclass(frozen=True)
class Constant:
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
        if not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"a segment needs at least 1 token, got Constant(size={self.size!r})")

    def plan(self, length: int) -> ReadPlan:
        """The read plan of a sequence of ``length`` tokens."""
        blocks = -(-length // self.size)
        bucket = np.arange(blocks - 1)
        reads = np.where(bucket[None] < np.arange(blocks)[:, None], bucket[None], -1)
        return ReadPlan(self.size, np.stack([bucket, bucket + 1], axis=1), reads)
