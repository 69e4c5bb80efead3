"""Segments whose borders the tokens decide: where they lie, and the states that blocks may read."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memcache_jax._typing import Array, Float, Int, State
from memcache_jax.adaptive import Adaptive
from memcache_jax.engine.documents import (
    DocumentBuckets,
    block_sums,
    blocks_of_last_document,
    running_document_keys,
    slot_keys,
)
from memcache_jax.engine.types import Candidates, Keys
from memcache_jax.segmentation import ReadPlan


class Borders(NamedTuple):
    """The segments of each row, and the slots of their states: slot i has the i-th to end.

    Attributes:
      before: segments that ended before each block.
      last: the last block of the segment in each slot; any block where there is none.
      segment: the number of each token's segment, counted over all documents of the row.
      document: the number of each token's document; None without packed documents.
    """

    before: Int[Array, "b n"]
    last: Int[Array, "b r"]
    segment: Int[Array, "b n c"]
    document: Int[Array, "b n c"] | None

    def of_tokens(self, length: int) -> Int[Array, "b t"]:
        """The number of each token's segment."""
        return self.segment.reshape(len(self.segment), -1)[:, :length]


def find_borders(
    segmentation: Adaptive, key: Float[Array, "b h t k"], document: Int[Array, "b t"] | None
) -> Borders:
    """Decides where segments end, block by block."""
    length, size = key.shape[2], segmentation.size
    count = segmentation.plan(length).num_blocks
    padding = count * size - length
    blocks = jnp.pad(lax.stop_gradient(key), [(0, 0), (0, 0), (0, padding), (0, 0)])
    blocks = blocks.reshape(*blocks.shape[:2], count, size, -1)
    of_blocks, begins = None, jnp.zeros((len(key), count), bool)
    if document is None:
        sums = blocks.sum(axis=3)
    else:
        of_blocks = jnp.pad(document, ((0, 0), (0, padding)), mode="edge")
        of_blocks = of_blocks.reshape(-1, count, size)
        sums = block_sums(blocks, of_blocks).keys
        begins = jnp.pad(jnp.diff(of_blocks[:, :, -1], axis=1) != 0, ((0, 0), (1, 0)))

    def step(carry: tuple, xs: tuple) -> tuple[tuple, Array]:
        before, segment = carry
        block, begins = xs
        before = jnp.where(begins, 0, before)
        segment = jnp.where(begins[:, None, None], 0, segment)
        ends = segmentation.ends(before, segment, block)
        before = jnp.where(ends, 0, before + 1)
        return (before, jnp.where(ends[:, None, None], 0, segment + block)), ends

    zeros = jnp.zeros_like(sums[:, 0, 0, 0], dtype=jnp.int32), jnp.zeros_like(sums[:, :, 0])
    xs = jnp.moveaxis(sums, 2, 0), begins.T
    ended = jnp.cumsum(lax.scan(step, zeros, xs)[1], axis=0, dtype=jnp.int32).T
    before = jnp.pad(ended[:, :-1], ((0, 0), (1, 0)))
    slots = np.arange(1, segmentation.most_states(length) + 1)
    last = jax.vmap(lambda row: jnp.searchsorted(row, slots))(ended)
    last = jnp.minimum(last, max(0, count - 1)).astype(jnp.int32)
    segment = jnp.broadcast_to(before[:, :, None], (len(key), count, size))
    if of_blocks is not None:
        segment += of_blocks
    return Borders(before, last, segment, of_blocks)


def states_of(borders: Borders, ends: State) -> State:
    """Of the states at the ends of all blocks, those at the ends of segments, (b, h, r, ...)."""
    take = jax.vmap(lambda x, last: x[:, last])
    return jax.tree.map(lambda x: take(x, borders.last), ends)


def adaptive_candidates(
    plan: ReadPlan,
    key: Float[Array, "b h n c k"],
    pooled: Float[Array, "b h n c k"],
    borders: Borders,
) -> Candidates:
    """The segments that blocks may read: those that ended before, of the same document.

    Args:
      plan: of ``Adaptive``, whose buckets are the slots.
      key: the tokens' keys.
      pooled: those to pool for cached states.
      borders: where segments end.
    """
    count, size = key.shape[2:4]
    segment, document = (
        None if x is None else x[:, :, :size] for x in (borders.segment, borders.document)
    )
    assert segment is not None
    whole = ReadPlan(size, np.zeros((0, 2), int), np.zeros((count, 0), int), np.zeros(count, int))
    sums = block_sums(pooled, segment)

    def keys(pooling: str) -> Keys:
        def of_head(key: Any, sums: Any, counts: Any, segment: Any, last: Any) -> Keys:
            live = running_document_keys(key, whole, pooling, segment)
            first = last - blocks_of_last_document(segment)[last]
            slots = DocumentBuckets(first[None], last[None] + 1, last[None])
            return Keys(live, states=slot_keys(sums, counts, slots, pooling)[0])

        of_row = jax.vmap(of_head, in_axes=(0, 0, None, None, None))
        return jax.vmap(of_row)(key, *sums, segment, borders.last)

    distances = borders.before[:, :, None] - jnp.arange(len(plan.buckets))[None, None]
    seen = (distances > 0)[:, :, None]
    if document is not None:
        of_states = jnp.take_along_axis(document[:, :, -1], borders.last, axis=1)
        seen &= document[..., None] == of_states[:, None, None]
    return Candidates(
        plan.reads[None], distances, keys, same_document=seen if len(plan.buckets) else None
    )
