"""Segments that end where the content changes, decided by the tokens so far."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from memcache_jax._checks import check_integer, check_number, set_fields
from memcache_jax._typing import Array, Bool, Float, Int
from memcache_jax.segmentation import ReadPlan, Segmentation


@dataclasses.dataclass(frozen=True)
class Adaptive(Segmentation):
    """Segments of ``min`` to ``max`` tokens that end when the keys change direction.

    Borders lie between blocks of ``block`` tokens. A segment with the keys' sum K ends with a block
    whose keys sum to k if it has ``min`` tokens and::

        surprise = 1 - mean over heads of cos(K, k) > threshold

    or if it has ``max`` tokens, where K is the sum before the block. So a segment's pooled key, by
    which gates and routers find its state, stands for keys of one direction. A border depends only
    on tokens before it: outputs are causal and do not depend on the sequence's length. It is the
    same for all heads of a row. No gradient passes through the choice of borders.

    A token reads the states of all segments before its own, at most length / min. Every row has its
    own borders; arrays have room for the most segments. Each packed document begins a segment,
    and its borders depend on no other document. Blocks wait for each other even with
    independent starts, which need a rule that takes ``document_ids``. A mesh may divide rows;
    it does not divide heads, and dividing time is refused. A surprise within rounding of the
    threshold may fall on either side of it in another program.

    The paper (arXiv:2602.24281) has segments of fixed sizes only.

    Attributes:
      min: fewest tokens in a segment.
      max: most tokens in a segment.
      threshold: of the surprise, which is 1 for keys at a right angle to the segment's, and 0 in a
        segment's first block. At 2 or more all segments have ``max`` tokens.
      block: tokens between possible borders, ``min`` by default; divides both. A segment can end
        early only with its second block or a later one.

    Raises:
      ValueError: for sizes below 1, ``max`` below ``min``, a ``block`` that does not divide both,
        or a negative threshold.

    Example:
      >>> import memcache_jax as mc
      >>> segmentation = mc.Adaptive(32, 256, block=16)
      >>> segmentation.size, segmentation.most_states(1000)
      (16, 31)
    """

    min: int
    max: int
    threshold: float = 0.5
    block: int | None = None
    size: int = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        fewest, most = (check_integer(name, getattr(self, name)) for name in ("min", "max"))
        block = check_integer("block", self.block, optional=True)
        size = fewest if block is None else block
        if fewest % size or most % size or most < fewest:
            raise ValueError(
                f"Adaptive needs min <= max, both multiples of block, got min={fewest}, "
                f"max={most}, block={size}"
            )
        threshold = check_number("threshold", self.threshold, ">= 0", lambda x: x >= 0)
        set_fields(self, min=fewest, max=most, threshold=threshold, block=block, size=size)

    def plan(self, length: int) -> ReadPlan:
        """The plan with borders as close as they can be: every ``min`` tokens."""
        blocks, step = np.arange(self._blocks(length)), self.min // self.size
        bucket = np.arange(self.most_states(length))
        reads = np.where((bucket + 1) * step <= blocks[:, None], bucket[None], -1)
        buckets = np.stack([bucket, bucket + 1], axis=1) * step
        return ReadPlan(self.size, buckets, reads, blocks // step * step)

    def most_states(self, length: int) -> int:
        """The most states that a token of such a sequence can read."""
        return max(0, self._blocks(length) - 1) // (self.min // self.size)

    def span(self, segments: int) -> int:
        """The fewest tokens in the first ``segments`` segments."""
        return check_integer("segments", segments, 0) * self.min

    def ends(
        self, before: Int[Array, "b"], segment: Float[Array, "b h k"], block: Float[Array, "b h k"]
    ) -> Bool[Array, "b"]:
        """Whether the segment of each row ends with a block.

        Args:
          before: blocks of the segment before it.
          segment: the sum of their keys.
          block: the sum of the block's own keys, of the segment's document.
        """
        squares = jnp.sum(segment**2, axis=-1) * jnp.sum(block**2, axis=-1)
        products = jnp.vecdot(segment, block, precision="highest")
        cosines = products / jnp.sqrt(jnp.where(squares == 0, 1, squares))
        surprising = (before > 0) & (1 - cosines.mean(axis=-1) > self.threshold)
        blocks = before + 1
        long = blocks >= self.min // self.size
        return (long & surprising) | (blocks >= self.max // self.size)
