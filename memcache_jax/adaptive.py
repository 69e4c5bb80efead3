"""Segments that end where the content changes, decided by the tokens so far."""

import dataclasses
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._checks import check_choice, check_integer, check_number, set_fields
from memcache_jax._typing import Array, Bool, Float, Int
from memcache_jax.segmentation import ReadPlan, Segmentation

By: TypeAlias = Literal["keys", "errors", "scores"]
"""What decides where a segment of ``Adaptive`` ends."""


@dataclasses.dataclass(frozen=True)
class Adaptive(Segmentation):
    """Segments of ``min`` to ``max`` tokens that end when the content changes.

    Borders lie between blocks of ``block`` tokens. A segment ends with a block if it has ``min``
    tokens and surprise > threshold, or if it has ``max`` tokens; arXiv:2602.24281 has segments of
    fixed sizes only. A border depends only on tokens before it: outputs are causal and do not
    depend on the sequence's length. It is the same for all heads of a row. The surprise of a block
    depends on ``by``:

    ``"keys"``: 1 - cos(K, k), mean over heads, where k is the sum of the block's keys and K the sum
    of the segment's keys before it. So the keys of a segment have similar directions, and its
    pooled key, by which gates and routers find its state, represents them.

    ``"errors"``: 1 - E / e, where e is the mean relative error of the memory over the block's
    tokens and heads, and E that over the segment's earlier blocks::

        error of token t = |v_t - M_{t-1}(k_t)|^2 / |v_t|^2    (0 where v_t = 0)

    So a segment ends when its memory no longer predicts the values; a threshold of 0.5 means that
    the error doubles. A rule with a chunk size recalls with the state at the chunk's start, where
    it also takes its gradient. M is the live memory, which restarts at borders with independent
    starts: a stream needs no second memory, and a border does not depend on how long ago the
    document began. The cost: one pass writes twice, first to find the borders, block by block and
    without gradients; in a stream single tokens add one read, and whole chunks are written twice.

    ``"scores"``: sigmoid(s), where s is the mean over the block's tokens and heads of the logits
    ``memory_caching(border=...)``. Layers learn a linear map from their input to these logits. At
    the default threshold of 0.5 a segment ends where s > 0.

    No gradient passes through borders by keys and errors. Scores are learned by a straight-through
    estimator (arXiv:1308.3432), like the boundaries of arXiv:2507.07955. Outputs read only the
    states at borders, but the gradient of the scores is that of a relaxation: each block that may
    end a segment has a state in the gates of later tokens, with relevance r + log p for
    p = sigmoid(s), so that it counts p times; where ``max`` forces the border it counts once. So a
    border is learned where a state that ends there would help later tokens. The relaxation's states
    begin where the segments do, and have no ``exact`` tokens. Training reads up to min / block
    times as many states. Streams give scores no gradient. If nearly all blocks are borders, the
    relaxation has few states to add, so layers start with logits of -1. More states rarely hurt
    a loss, which may therefore need a term that keeps borders few.

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
      threshold: of the surprise, which has no unit. By keys it is 1 at a right angle and at most 2;
        by errors and scores it is below 1. At 2 or more all segments have ``max`` tokens.
      block: tokens between possible borders, ``min`` by default; divides ``min`` and ``max``. By
        keys and errors only the second block or a later one can end a segment early.
      by: what decides: ``"keys"``, ``"errors"`` or ``"scores"``.

    Raises:
      ValueError: for sizes below 1, ``max`` below ``min``, a ``block`` that does not divide both,
        a negative threshold, or an unknown ``by``.

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
    by: By = "keys"
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
        check_choice("by", self.by, get_args(By))
        set_fields(self, min=fewest, max=most, threshold=threshold, block=block, size=size)

    def plan(self, length: int) -> ReadPlan:
        """The plan with borders as close as they can be: every ``min`` tokens."""
        blocks, step = np.arange(self._blocks(length)), self.min // self.size
        bucket = np.arange(self.most_states(length))
        reads = np.where((bucket + 1) * step <= blocks[:, None], bucket[None], -1)
        buckets = np.stack([bucket, bucket + 1], axis=1) * step
        most = np.full(len(blocks), self.max // self.size)
        return ReadPlan(self.size, buckets, reads, blocks // step * step, most)

    def most_states(self, length: int) -> int:
        """The most states that a token of such a sequence can read."""
        return max(0, self._blocks(length) - 1) // (self.min // self.size)

    def span(self, segments: int) -> int:
        """The fewest tokens in the first ``segments`` segments."""
        return check_integer("segments", segments, 0) * self.min

    def ends(
        self,
        before: Int[Array, "b"],
        segment: Float[Array, "b *measure"],
        block: Float[Array, "b *measure"],
    ) -> Bool[Array, "b"]:
        """Whether the segment of each row ends with a block.

        Args:
          before: blocks of the segment before it.
          segment: the sum of the measures of these blocks.
          block: the block's own measure, over the tokens of the segment's document: by keys their
            sum (b, h, k); by errors the mean error and by scores the mean logit, (b,).
        """
        blocks = before + 1
        surprising = self.surprise(before, segment, block) > self.threshold
        return (self.may_end(blocks) & surprising) | self.must_end(blocks)

    def surprise(
        self,
        before: Int[Array, "b"],
        segment: Float[Array, "b *measure"],
        block: Float[Array, "b *measure"],
    ) -> Float[Array, "b"]:
        """The surprise of a block; arguments as for ``ends``."""
        if self.by == "scores":
            return jax.nn.sigmoid(block)
        if self.by == "errors":
            surprise = 1 - segment / jnp.maximum(before, 1) / jnp.where(block == 0, 1, block)
            return jnp.where((before > 0) & (block != 0), surprise, 0)
        squares = jnp.sum(segment**2, axis=-1) * jnp.sum(block**2, axis=-1)
        products = jnp.vecdot(segment, block, precision="highest")
        cosines = products / jnp.sqrt(jnp.where(squares == 0, 1, squares))
        return jnp.where(before > 0, 1 - cosines.mean(axis=-1), 0)

    def may_end(self, blocks: Int[Array, "*b"]) -> Bool[Array, "*b"]:
        """Whether segments of so many blocks have ``min`` tokens."""
        return blocks >= self.min // self.size

    def must_end(self, blocks: Int[Array, "*b"]) -> Bool[Array, "*b"]:
        """Whether segments of so many blocks have ``max`` tokens."""
        return blocks >= self.max // self.size
