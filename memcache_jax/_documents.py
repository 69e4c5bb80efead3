"""Documents packed into one sequence: which of them a token is of, and which buckets they read."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Int
from memcache_jax.segmentation import ReadPlan


def count_documents(document_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Documents that have begun after the first: an id may come again, this does not."""
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
    number = jnp.pad(_blocks_of_last_document(document)[:-1] + 1, (1, 0))
    begun = (np.arange(plan.num_blocks) - number)[:, None]
    bucket = jnp.asarray(plan.reads)[number]
    span = jnp.asarray(plan.buckets)[jnp.maximum(bucket, 0)]
    first, after = (jnp.where(bucket >= 0, begun + span[..., side], 0) for side in (0, 1))
    return DocumentBuckets(first, after, jnp.asarray(plan.distances)[number])


def runs_of_documents(document: Int[Array, "n c"], size: int) -> Int[Array, "runs"]:
    """First blocks of the runs of ``size`` blocks into which each document divides.

    A block is of the document of its last token. There are n // size in any case, the last ones
    perhaps of no use.
    """
    last = document[:, -1]
    begins = _blocks_of_last_document(document)[: len(last) - size + 1] % size == 0
    whole = last[: len(last) - size + 1] == last[size - 1 :]
    (first,) = jnp.nonzero(begins & whole, size=len(last) // size, fill_value=len(last) - size)
    return first


def _blocks_of_last_document(document: Int[Array, "n c"]) -> Int[Array, "n"]:
    """Blocks since the one in which the document of each block's last token began."""
    last = document[:, -1]
    return jnp.arange(len(last)) - jnp.searchsorted(last, last)
