"""Several pooled keys per state, one for each equal span of its tokens.

The functions that pool one key per segment pool these too, over a plan whose blocks are the spans.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Float, Int
from memcache_jax.adaptive import Adaptive
from memcache_jax.engine.documents import (
    DocumentBuckets,
    blocks_of_last_document,
    buckets_of_documents,
    running_document_keys,
    slot_keys,
)
from memcache_jax.engine.types import SpanKeys
from memcache_jax.gating import pooled_keys, running_keys
from memcache_jax.segmentation import Constant, Lengths, Logarithmic, ReadPlan, Segmentation


def check_num_keys(num_keys: int, segmentation: Segmentation) -> None:
    """Raises ValueError where segments do not divide into as many equal spans."""
    if num_keys == 1:
        return
    fits = isinstance(segmentation, Constant | Logarithmic | Lengths)
    fits = fits and segmentation.size % num_keys == 0
    if isinstance(segmentation, Adaptive):
        fits = segmentation.max // segmentation.size % num_keys == 0
    if not fits:
        raise ValueError(
            f"num_keys={num_keys} needs Constant or Logarithmic segments of a size that it divides,"
            " Lengths whose greatest common divisor it divides, or Adaptive with a max of a"
            f" multiple of num_keys blocks, got {segmentation}"
        )


def span_plan(plan: ReadPlan, num_keys: int) -> ReadPlan:
    """The plan whose buckets are the spans of a plan's buckets, one after the other.

    Its segments are the spans of the plan's segments, and its blocks are ``num_keys`` to a block of
    the plan.
    """
    first, after = plan.buckets.T[..., None]
    begin = (first * num_keys + (after - first) * np.arange(num_keys)).reshape(-1)
    size = np.repeat(after - first, num_keys)
    blocks = np.arange(plan.num_blocks * num_keys)
    begun, most = (np.repeat(x, num_keys) for x in (plan.first * num_keys, _segment_blocks(plan)))
    return ReadPlan(
        plan.block_size // num_keys,
        np.stack([begin, begin + size], axis=1),
        np.zeros((len(blocks), 0), int),
        begun + (blocks - begun) // most * most,
    )


def span_keys(
    own: ReadPlan,
    plan: ReadPlan,
    key: Float[Array, "b h n c k"],
    pooled: Float[Array, "b h n c k"],
    pooling: str,
    num_keys: int,
    document: Int[Array, "b n c"] | None = None,
    gather: Callable[[Array, int], Array] = lambda x, axis: x,
) -> SpanKeys:
    """The pooled keys of spans, where a bucket has the same spans in every row.

    Args:
      own: the plan of the blocks that read; where it is a part of ``plan``, each is a segment.
      plan: the plan of the whole sequence, which numbers the states.
      key: the blocks' keys.
      pooled: the keys to pool for states that have ended.
      pooling: ``"mean"`` or ``"sum"``.
      num_keys: spans of a segment, and of a bucket.
      document: the number of each token's document; a bucket must then be one segment.
      gather: takes an array of these blocks along an axis to that of all blocks of the sequence.
    """
    count, spans = own.num_blocks, span_plan(plan, num_keys)
    each, ends = span_plan(own, num_keys), _ends_of_spans(own, key.shape[3], num_keys)
    pieces = ReadPlan(each.block_size, _blocks(each), each.reads, np.arange(each.num_blocks))
    whole = bool(np.all(_segment_blocks(plan) == 1))

    def of_head(key: Array, pooled: Array, document: Any) -> tuple[Array, Array, Array]:
        dim = key.shape[-1]
        key, pooled, cut = (_cut(x, num_keys) for x in (key, pooled, document))
        if document is None:
            live = running_keys(key, each, pooling)
        else:
            live = running_document_keys(key, each, pooling, cut)
        if whole:
            ended = pooled_keys(pooled, pieces, pooling, cut)
            states = pooled_keys(gather(ended, 0)[:, None], spans, pooling)
        else:
            ended = live.reshape(-1, dim)[ends.reshape(-1)]
            states = pooled_keys(pooled, spans, pooling, cut)
        shape = count, num_keys, dim
        return live.reshape(count, -1, dim), ended.reshape(shape), states.reshape(-1, *shape[1:])

    of_row = jax.vmap(of_head, in_axes=(0, 0, None))
    live, ended, states = jax.vmap(of_row)(key, pooled, document)
    if document is not None:
        # A span outside the state's document gets the key of the last span, which is inside.
        ends = document.reshape(*document.shape[:2], num_keys, -1)[..., -1]
        ends = gather(ends, 1).reshape(len(document), -1)
        last = ends[:, (spans.buckets[:, 1] - 1).reshape(-1, num_keys)]
        same = (last == last[..., -1:])[:, None, ..., None]
        states = jnp.where(same, states, states[..., -1:, :])
    return SpanKeys(live, ended, _seen(own, key, num_keys, document), states=states)


def decided_span_keys(
    whole: ReadPlan,
    size: int,
    pooling: str,
    num_keys: int,
    key: Float[Array, "n c k"],
    sums: Float[Array, "n k"],
    counts: Float[Array, "n"],
    segment: Int[Array, "n c"],
    last: Int[Array, "r"],
) -> tuple[Array, Array, Array, Array]:
    """The fields of ``SpanKeys``, where the tokens of a row decide about its segments.

    A segment has spans of ``size`` blocks, the last one perhaps of fewer; a state's missing spans
    get the key of its last.

    Args:
      whole: the plan of one segment of all blocks.
      size: blocks of a span.
      pooling: ``"mean"`` or ``"sum"``.
      num_keys: spans of the longest segment.
      key: the tokens' keys.
      sums: of each block, those of the segment of its last token.
      counts: how many these are.
      segment: the number of each token's segment.
      last: the last block of each state.
    """
    block, span = np.arange(len(segment)), np.arange(num_keys)[None]
    begun = block - blocks_of_last_document(segment)
    before = jnp.pad(begun[:-1], (1, 0))
    goes_on = segment == jnp.pad(segment[:-1, -1], (1, 0), constant_values=-1)[:, None]
    own = (block[:, None] - jnp.where(goes_on, before[:, None], block[:, None])) // size
    live = running_document_keys(key, whole, pooling, segment * num_keys + own)

    first = begun[last][:, None]
    begin = first + jnp.minimum(span, (last[:, None] - first) // size) * size
    after = jnp.minimum(begin + size, last[:, None] + 1)
    states = slot_keys(sums, counts, DocumentBuckets(begin, after, after), pooling)

    begin = before[:, None] + span * size
    done = begin + size <= block[:, None]
    begin, after = (jnp.where(done, x, 0) for x in (begin, begin + size))
    ended = slot_keys(sums, counts, DocumentBuckets(begin, after, after), pooling)
    return live, ended, goes_on[..., None] & done[:, None], states


def document_span_keys(
    plan: ReadPlan,
    key: Float[Array, "b h n c k"],
    pooled: Float[Array, "b h n c k"],
    document: Int[Array, "b n c"],
    pooling: str,
    num_keys: int,
) -> SpanKeys:
    """The pooled keys of spans of packed documents; those of several segments are by slot."""
    count = plan.num_blocks
    made = span_keys(plan, plan, key, pooled, pooling, num_keys, document)
    if not plan.spans_segments.any():
        return made
    slots = jax.vmap(lambda row: buckets_of_documents(plan, row))(document)
    same = _cut((document == document[:, :, -1:]).reshape(-1, key.shape[3]), num_keys)
    same = same.reshape(len(document), count * num_keys, -1)
    pooled = pooled.reshape(*pooled.shape[:2], count * num_keys, -1, pooled.shape[-1])
    sums = jnp.sum(pooled, axis=3, where=same[:, None, ..., None])
    counts = same.sum(axis=-1).astype(sums.dtype)
    size = jnp.repeat(slots.after - slots.first, num_keys, axis=-1)
    number = (np.arange(size.shape[-1]) % num_keys)[None, None]
    first = jnp.repeat(slots.first, num_keys, axis=-1) * num_keys + number * size
    spans = DocumentBuckets(first, first + size, size)

    def of_head(sums: Any, counts: Any, spans: Any) -> tuple[Array, Array]:
        tokens = slot_keys(counts[:, None], counts, spans, "sum")
        return slot_keys(sums, counts, spans, pooling), tokens

    of_row = jax.vmap(of_head, in_axes=(0, None, None))
    keys, tokens = (
        x.reshape(*x.shape[:3], -1, num_keys, x.shape[-1])
        for x in jax.vmap(of_row)(sums, counts, spans)
    )
    # In a document's first block, spans may end before the document begins.
    keys = jnp.where(tokens > 0, keys, keys[..., -1:, :])
    return made._replace(states=None, slots=keys)


def _cut(x: Any, num_keys: int) -> Any:
    """Blocks (n, c, ...) cut into spans (n * num_keys, c / num_keys, ...)."""
    return None if x is None else x.reshape(len(x) * num_keys, -1, *x.shape[2:])


def _segment_blocks(plan: ReadPlan) -> np.ndarray:
    if plan.segment_blocks is None:
        return np.ones(plan.num_blocks, int)
    return plan.segment_blocks


def _blocks(plan: ReadPlan) -> np.ndarray:
    """A bucket for each block."""
    block = np.arange(plan.num_blocks)
    return np.stack([block, block + 1], axis=1)


def _ends_of_spans(plan: ReadPlan, size: int, num_keys: int) -> np.ndarray:
    """The last tokens of the spans of each block's segment (n, spans), or the last of all."""
    span = np.arange(1, num_keys + 1)[None]
    last = plan.first[:, None] * num_keys + _segment_blocks(plan)[:, None] * span
    return np.minimum(last * (size // num_keys), plan.num_blocks * size) - 1


def _seen(own: ReadPlan, key: Array, num_keys: int, document: Int[Array, "b n c"] | None) -> Any:
    """Which spans of a token's segment ended before its own, in its document."""
    count, size = key.shape[2:4]
    ends, token = _ends_of_spans(own, size, num_keys), np.arange(count * size)
    before = (ends[:, None] < token.reshape(count, size, 1))[None]
    if document is None:
        return before
    last = document.reshape(len(document), -1)[:, ends]
    return before & (last[:, :, None] == document[..., None])
