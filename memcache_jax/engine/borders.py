"""Segments whose borders the tokens decide: where they lie, and the states that blocks may read."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memcache_jax._typing import Array, Bool, Float, Int, State
from memcache_jax.adaptive import Adaptive
from memcache_jax.engine.documents import (
    DocumentBuckets,
    block_sums,
    blocks_of_last_document,
    running_document_keys,
    slot_keys,
)
from memcache_jax.engine.measures import Measure, by_keys, by_scores
from memcache_jax.engine.spans import decided_span_keys
from memcache_jax.engine.types import Candidates, Keys, SpanKeys
from memcache_jax.segmentation import ReadPlan


class Borders(NamedTuple):
    """The segments of each row, and the slots of their states: slot i has the i-th to end.

    Attributes:
      before: segments that ended before each block.
      last: the last block of the segment in each slot; the row's last block where there is none.
      segment: the number of each token's segment, counted over all documents of the row.
      document: the number of each token's document; None without packed documents.
      log_counts: as in ``Candidates``, of the states in the slots; None if each counts once.
    """

    before: Int[Array, "b n"]
    last: Int[Array, "b r"]
    segment: Int[Array, "b n c"]
    document: Int[Array, "b n c"] | None
    log_counts: Float[Array, "b r"] | None = None

    def of_tokens(self, length: int) -> Int[Array, "b t"]:
        """The number of each token's segment."""
        return self.segment.reshape(len(self.segment), -1)[:, :length]


def find_borders(
    segmentation: Adaptive,
    key: Float[Array, "b h t k"],
    document: Int[Array, "b t"] | None,
    *,
    border: Float[Array, "b h t"] | None = None,
    errors: Measure | None = None,
) -> Borders:
    """Decides block by block where segments end: by keys, by logits ``border``, or by errors."""
    count, of_blocks = segmentation.plan(key.shape[2]).num_blocks, None
    begins = jnp.zeros((len(key), count), bool)
    if document is not None:
        of_blocks = in_blocks(document[:, None], segmentation, mode="edge")[:, 0]
        begins = jnp.pad(jnp.diff(of_blocks[:, :, -1], axis=1) != 0, ((0, 0), (1, 0)))
    if segmentation.by == "errors":
        assert errors is not None
        measure = errors
    elif segmentation.by == "scores":
        assert border is not None
        measure = by_scores(in_blocks(lax.stop_gradient(border), segmentation), of_blocks)
    else:
        measure = by_keys(in_blocks(lax.stop_gradient(key), segmentation), of_blocks)

    def step(carry: tuple, xs: tuple) -> tuple[tuple, Array]:
        before, segment, ended, state = carry
        block, begins = xs
        state, own = measure.step(state, block, ended)
        restarts = begins.reshape(-1, *[1] * (own.ndim - 1))
        before, segment = jnp.where(begins, 0, before), jnp.where(restarts, 0, segment)
        ends = segmentation.ends(before, segment, own)
        before = jnp.where(ends, 0, before + 1)
        segment = jnp.where(ends.reshape(restarts.shape), 0, segment + own)
        return (before, segment, ends, state), ends

    one = jax.tree.map(lambda x: x[0], measure.blocks)
    _, like = jax.eval_shape(measure.step, measure.first, one, begins[:, 0])
    zero = jnp.zeros_like(key[:, 0, 0, 0], dtype=jnp.int32)
    segment = jnp.zeros_like(key, shape=like.shape, dtype=like.dtype)
    first = zero, segment, zero > 0, measure.first
    ends = lax.scan(step, first, (measure.blocks, begins.T))[1].T
    return borders_at(segmentation, ends, of_blocks)


def borders_at(
    segmentation: Adaptive, ends: Bool[Array, "b n"], document: Int[Array, "b n c"] | None
) -> Borders:
    """The borders, given whether a segment ends with each block."""
    count, size = ends.shape[1], segmentation.size
    ended = jnp.cumsum(ends, axis=1, dtype=jnp.int32)
    before = jnp.pad(ended[:, :-1], ((0, 0), (1, 0)))
    slots = np.arange(1, segmentation.most_states(count * size) + 1)
    last = jax.vmap(lambda row: jnp.searchsorted(row, slots))(ended)
    last = jnp.minimum(last, max(0, count - 1)).astype(jnp.int32)
    segment = jnp.broadcast_to(before[:, :, None], (len(ends), count, size))
    if document is not None:
        segment += document
    return Borders(before, last, segment, document)


def relaxed(
    segmentation: Adaptive, borders: Borders, border: Float[Array, "b h t"]
) -> tuple[ReadPlan, Borders]:
    """The relaxation whose gradient scores get: a slot for each block that may end a segment.

    Its state counts p times, the probability of the border; once where ``max`` forces it.
    """
    count = len(borders.before[0])
    closest = dataclasses.replace(segmentation, min=segmentation.size)
    plan = closest.plan(count * segmentation.size)
    score = by_scores(in_blocks(border, segmentation), borders.document).blocks.T
    ends = jnp.pad(jnp.diff(borders.before, axis=1) > 0, ((0, 0), (0, 1)))
    blocks = 1 + jax.vmap(blocks_of_last_document)(borders.segment)
    blocks, score, last = (x[:, :-1] for x in (blocks, score, jnp.arange(count)[None]))
    free = segmentation.may_end(blocks) & ~segmentation.must_end(blocks)
    last = jnp.where(free | ends[:, :-1], last, count - 1)
    log_counts = jnp.where(free, jax.nn.log_sigmoid(score), 0)
    return plan, borders._replace(last=last, log_counts=log_counts)


@jax.custom_jvp
def straight_through(hard: Array, soft: Array) -> Array:
    """The first argument, with the gradients of both."""
    del soft
    return hard


@straight_through.defjvp
def _(primals: tuple, tangents: tuple) -> tuple:
    return straight_through(*primals), tangents[0] + tangents[1]


def in_blocks(x: Array, segmentation: Adaptive, mode: Any = "constant") -> Array:
    """Cuts arrays (b, h, t, ...) into blocks (b, h, n, c, ...), and pads the last one."""
    size = segmentation.size
    widths = [(0, -x.shape[2] % size if axis == 2 else 0) for axis in range(x.ndim)]
    return jnp.pad(x, widths, mode=mode).reshape(*x.shape[:2], -1, size, *x.shape[3:])


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

    def spans(pooling: str, num_keys: int) -> SpanKeys:
        assert plan.segment_blocks is not None
        size = int(plan.segment_blocks[0]) // num_keys
        of_head = functools.partial(decided_span_keys, whole, size, pooling, num_keys)
        of_row = jax.vmap(of_head, in_axes=(0, 0, None, None, None))
        live, ended, seen, states = jax.vmap(of_row)(key, *sums, segment, borders.last)
        return SpanKeys(live, ended, seen[:, 0], states=states)

    of_states = jnp.take_along_axis(borders.before, borders.last, axis=1)
    distances = jnp.maximum(borders.before[:, :, None] - of_states[:, None], 1)
    seen = (borders.last[:, None] < np.arange(count)[None, :, None])[:, :, None]
    if document is not None:
        of_states = jnp.take_along_axis(document[:, :, -1], borders.last, axis=1)
        seen &= document[..., None] == of_states[:, None, None]
    return Candidates(
        plan.reads[None],
        distances,
        keys,
        same_document=seen if len(plan.buckets) else None,
        spans=spans,
        log_counts=borders.log_counts,
    )
