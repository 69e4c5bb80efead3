"""Documents packed into one sequence: each token's document, and the buckets it may read."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Bool, Float, Int
from memcache_jax.engine.types import Candidates, Keys
from memcache_jax.gating import finite_rows, pooled_keys
from memcache_jax.kernels.running_sum import running_document_sum
from memcache_jax.segmentation import ReadPlan


def count_documents(document_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Documents that have begun after the first; unlike ids, these numbers never repeat."""
    changes = document_ids[:, 1:] != document_ids[:, :-1]
    return jnp.pad(jnp.cumsum(changes, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def begun_in_chunk(document: Int[Array, "b n c"], chunk: int) -> Int[Array, "b n c"]:
    """Documents that have begun in a token's chunk, up to and with it."""
    chunks = document.reshape(document.shape[0], -1, chunk)
    before = jnp.pad(chunks[:, :-1, -1], ((0, 0), (1, 0)))
    return (chunks - before[..., None]).reshape(document.shape)


class DocumentBuckets(NamedTuple):
    """The buckets that the blocks of one row read, none where first = after.

    Attributes:
      first: first block of the bucket in each slot.
      after: the block after its last.
      distances: as a plan's, of the slots that hold one.
    """

    first: Int[Array, "n r"]
    after: Int[Array, "n r"]
    distances: Int[Array, "n r"]


def buckets_of_documents(plan: ReadPlan, document: Int[Array, "n c"]) -> DocumentBuckets:
    """The plan's buckets, where each block counts from the one in which its document began.

    That is the document which goes on into the block from the one before; others that begin in the
    block have nothing to read.
    """
    # Block s counts one more than block s - 1 did of its last document.
    number = jnp.pad(blocks_of_last_document(document)[:-1] + 1, (1, 0))
    begun = (np.arange(plan.num_blocks) - number)[:, None]
    bucket = jnp.asarray(plan.reads)[number]
    span = jnp.asarray(plan.buckets)[jnp.maximum(bucket, 0)]
    first, after = (jnp.where(bucket >= 0, begun + span[..., side], 0) for side in (0, 1))
    return DocumentBuckets(first, after, jnp.asarray(plan.distances)[number])


def runs_of_documents(document: Int[Array, "n c"], size: int) -> Int[Array, "runs"]:
    """First blocks of the runs of ``size`` blocks into which each document divides.

    A block belongs to the document of its last token. There are always n // size entries; the last
    ones may be padding.
    """
    last = document[:, -1]
    begins = blocks_of_last_document(document)[: len(last) - size + 1] % size == 0
    whole = last[: len(last) - size + 1] == last[size - 1 :]
    (first,) = jnp.nonzero(begins & whole, size=len(last) // size, fill_value=len(last) - size)
    return first


def blocks_of_last_document(document: Int[Array, "n c"]) -> Int[Array, "n"]:
    """Blocks since the one in which the document of each block's last token began."""
    last = document[:, -1]
    return jnp.arange(len(last)) - jnp.searchsorted(last, last)


def document_candidates(
    plan: ReadPlan,
    key: Float[Array, "b h n c k"],
    pooled: Float[Array, "b h n c k"],
    document: Int[Array, "b n c"],
) -> Candidates:
    """The buckets that a plan's blocks may read where documents are packed.

    If a bucket has several segments, buckets follow each row's documents, see
    ``bucket_candidates``.
    """
    if plan.spans_segments.any():
        slots = jax.vmap(lambda row: buckets_of_documents(plan, row))(document)
        sums = block_sums(pooled, document)
        return bucket_candidates(plan, key, sums, slots, document, document[:, :, -1])
    states, same = plan.reads[None], None
    if len(plan.buckets):
        after = jnp.asarray(plan.buckets[:, 1])[np.maximum(states, 0)]
        after = jnp.broadcast_to(after, (len(document), *after.shape[1:]))
        same = _same_document(document, document[:, :, -1], after)

    def keys(pooling: str) -> Keys:
        def of_head(key: Any, pooled: Any, document: Any) -> Keys:
            live = running_document_keys(key, plan, pooling, document)
            return Keys(live, states=pooled_keys(pooled, plan, pooling, document))

        of_row = jax.vmap(of_head, in_axes=(0, 0, None))
        return jax.vmap(of_row)(key, pooled, document)

    return Candidates(states, plan.distances[None], keys, same_document=same)


class BlockSums(NamedTuple):
    """The keys that each block gives to the state at its end, those of its last document.

    Attributes:
      keys: their sum.
      counts: how many there are.
    """

    keys: Float[Array, "b h blocks k"]
    counts: Float[Array, "b blocks"]


def block_sums(pooled: Float[Array, "b h n c k"], document: Int[Array, "b n c"]) -> BlockSums:
    """The sums of blocks' keys, from which those of any bucket are made."""
    same = document == document[:, :, -1:]
    keys = jnp.sum(pooled, axis=3, where=same[:, None, :, :, None])
    return BlockSums(keys, same.sum(axis=2).astype(pooled.dtype))


def bucket_candidates(
    plan: ReadPlan,
    key: Float[Array, "b h n c k"],
    sums: BlockSums,
    slots: DocumentBuckets,
    document: Int[Array, "b n c"],
    last: Int[Array, "b blocks"],
) -> Candidates:
    """The buckets that blocks may read, where these follow each row's documents.

    ``document_states`` numbers their states; here ``states`` only says which slots are empty.

    Args:
      plan: the plan of the blocks that read, all of a sequence or a part of it.
      key: their keys.
      sums: of all blocks of the sequence.
      slots: the buckets that the blocks read, (b, n, r).
      document: the document of each of their tokens, counted over the sequence.
      last: the document of the last token of each block of the sequence.
    """

    def keys(pooling: str) -> Keys:
        def of_head(key: Any, sums: Any, counts: Any, slots: Any, document: Any) -> Keys:
            live = running_document_keys(key, plan, pooling, document)
            return Keys(live, slots=slot_keys(sums, counts, slots, pooling))

        of_row = jax.vmap(of_head, in_axes=(0, 0, None, None, None))
        return jax.vmap(of_row)(key, *sums, slots, document)

    same = _same_document(document, last, slots.after)
    return Candidates(slots.after - 1, slots.distances, keys, same_document=same)


def _same_document(
    document: Int[Array, "b n c"], last: Int[Array, "b blocks"], after: Int[Array, "b n r"]
) -> Bool[Array, "b n c r"]:
    """Whether tokens are of the document that ends in the block before each ``after``."""
    of_state = jax.vmap(lambda row, after: row[after - 1])(last, after)
    return document[..., None] == of_state[:, :, None]


def running_document_keys(
    key: Float[Array, "n c k"], plan: ReadPlan, pooling: str, document: Int[Array, "n c"]
) -> Float[Array, "n c k"]:
    """``running_keys`` where sums also begin anew with each document."""
    n, c, _ = key.shape
    sums, block = running_document_sum(key, document), np.arange(n)
    if np.any(plan.first < block):
        last = document[:, -1]
        before = jnp.pad(last[:-1], (1, 0))  # the document that may go on into a block
        read = (plan.first[:, None] <= block[None]) & (block[None] < block[:, None])
        same = jnp.asarray(read) & (before[:, None] == last[None])
        earlier = jnp.tensordot(same.astype(key.dtype), sums[:, -1], axes=1, precision="highest")
        goes_on = (document == before[:, None])[..., None]
        sums += jnp.where(goes_on, earlier[:, None], 0)
    if pooling == "sum":
        return sums
    flat, place = document.reshape(-1), jnp.arange(n * c)
    begins = flat != jnp.pad(flat[:-1], (1, 0))
    begins = begins.reshape(n, c).at[:, 0].max(plan.begins).reshape(-1)
    first = jax.lax.cummax(jnp.where(begins, place, 0))
    return sums / (place - first + 1).astype(key.dtype).reshape(n, c, 1)


def slot_keys(
    sums: Float[Array, "blocks k"],
    counts: Float[Array, "blocks"],
    slots: DocumentBuckets,
    pooling: str,
) -> Float[Array, "n r k"]:
    """``pooled_keys`` of the bucket in each slot, zero where there is none."""
    sums, broken = finite_rows(sums)
    block = np.arange(len(sums))[None, None]
    inside = (slots.first[..., None] <= block) & (block < slots.after[..., None])

    def of_buckets(x: Array) -> Array:
        return jnp.tensordot(inside.astype(sums.dtype), x, axes=1, precision="highest")

    pooled = jnp.where(
        (inside & broken[None, None]).any(axis=-1)[..., None], jnp.nan, of_buckets(sums)
    )
    if pooling == "sum":
        return pooled
    return pooled / jnp.maximum(of_buckets(counts), 1)[..., None]
