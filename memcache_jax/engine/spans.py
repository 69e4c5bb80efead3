"""Several pooled keys per state, one for each equal span of its tokens.

The functions that pool one key per segment pool these too, over a plan whose blocks are the spans.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Float, Int
from memcache_jax.engine.documents import (
    DocumentBuckets,
    buckets_of_documents,
    running_document_keys,
    slot_keys,
)
from memcache_jax.engine.types import SpanKeys
from memcache_jax.gating import pooled_keys, running_keys
from memcache_jax.segmentation import ReadPlan


def span_plan(plan: ReadPlan, num_keys: int) -> ReadPlan:
    """The plan whose buckets are the spans of a plan's buckets, one after the other.

    Its blocks are the spans of the plan's blocks. Each block of ``plan`` must be a segment.
    """
    first, after = plan.buckets.T[..., None]
    begin = (first * num_keys + (after - first) * np.arange(num_keys)).reshape(-1)
    size = np.repeat(after - first, num_keys)
    blocks = np.arange(plan.num_blocks * num_keys)
    return ReadPlan(
        plan.block_size // num_keys,
        np.stack([begin, begin + size], axis=1),
        np.zeros((len(blocks), 0), int),
        blocks,
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
      own: the plan of the blocks that read, each of which is a segment.
      plan: the plan of the whole sequence, which numbers the states.
      key: the blocks' keys.
      pooled: the keys to pool for states that have ended.
      pooling: ``"mean"`` or ``"sum"``.
      num_keys: spans of a block, and of a bucket.
      document: the number of each token's document; a bucket must then be one segment.
      gather: takes an array of these blocks along an axis to that of all blocks of the sequence.
    """
    count = own.num_blocks
    block = np.arange(count)
    none = np.zeros((count, 0), int)
    each = ReadPlan(own.block_size, np.stack([block, block + 1], axis=1), none, block)
    each, spans = span_plan(each, num_keys), span_plan(plan, num_keys)

    def of_head(key: Array, pooled: Array, document: Any) -> tuple[Array, Array, Array]:
        shape = count, num_keys, key.shape[-1]
        key, pooled, cut = (_cut(x, num_keys) for x in (key, pooled, document))
        if document is None:
            live = running_keys(key, each, pooling)
        else:
            live = running_document_keys(key, each, pooling, cut)
        ended = pooled_keys(pooled, each, pooling, cut)
        states = pooled_keys(gather(ended, 0)[:, None], spans, pooling)
        states = states.reshape(-1, *shape[1:])
        return live.reshape(count, -1, shape[-1]), ended.reshape(shape), states

    of_row = jax.vmap(of_head, in_axes=(0, 0, None))
    live, ended, states = jax.vmap(of_row)(key, pooled, document)
    if document is not None:
        # A span outside the state's document gets the key of the last span, which is inside.
        last = gather(_ends(document, num_keys), 1)[:, plan.buckets[:, 1] - 1]
        same = (last == last[..., -1:])[:, None, ..., None]
        states = jnp.where(same, states, states[..., -1:, :])
    return SpanKeys(live, ended, _seen(own, key, num_keys, document), states=states)


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


def _ends(document: Int[Array, "b n c"], num_keys: int) -> Int[Array, "b n spans"]:
    """The documents of the last tokens of spans."""
    return document.reshape(*document.shape[:2], num_keys, -1)[..., -1]


def _seen(own: ReadPlan, key: Array, num_keys: int, document: Int[Array, "b n c"] | None) -> Any:
    """Which spans of a token's block ended before its own, in its document."""
    size = key.shape[3]
    span = np.arange(size) // (size // num_keys)
    before = (np.arange(num_keys) < span[:, None])[None, None]
    if document is None:
        return before
    return before & (_ends(document, num_keys)[:, :, None] == document[..., None])
