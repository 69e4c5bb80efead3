"""Relevance of memory states to a token: its connector against the states' pooled keys."""

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._documents import DocumentBuckets, buckets_of_documents
from memcache_jax._typing import Array, Bool, Float, Int
from memcache_jax.kernels.gate_softmax import softmax_gates as softmax_gates
from memcache_jax.kernels.running_sum import running_sum
from memcache_jax.segmentation import ReadPlan


def pooled_keys(
    key: Float[Array, "n c k"],
    plan: ReadPlan,
    pooling: str = "mean",
    document: Int[Array, "n c"] | None = None,
) -> Float[Array, "buckets k"]:
    """Returns the mean or the sum of each bucket's keys (Eq. 8 of arXiv:2602.24281).

    With documents, of the keys of the last token's document.
    """
    first, after = plan.buckets[:, 0], plan.buckets[:, 1]
    owner = np.repeat(np.arange(len(first)), after - first)
    block = np.concatenate([np.arange(f, a) for f, a in plan.buckets] or [first])

    def over_buckets(blocks: Array) -> Array:
        return jax.ops.segment_sum(blocks, owner, num_segments=len(first), indices_are_sorted=True)

    if document is None:
        sums = over_buckets((key.mean(axis=1) if pooling == "mean" else key.sum(axis=1))[block])
        return sums / jnp.asarray(after - first, key.dtype)[:, None] if pooling == "mean" else sums
    last = document[after - 1, -1][owner]
    same = document[block] == last[:, None]
    sums = over_buckets(jnp.sum(key[block], axis=1, where=same[..., None]))
    counts = over_buckets(same.sum(axis=1).astype(key.dtype))
    return sums / counts[:, None] if pooling == "mean" else sums


def running_keys(
    key: Float[Array, "n c k"],
    plan: ReadPlan,
    pooling: str = "mean",
    document: Int[Array, "n c"] | None = None,
) -> Float[Array, "n c k"]:
    """Returns, for each token, the mean or sum of its segment's keys, up to and with its own.

    With documents, of those of its own document.
    """
    if document is not None:
        return _running_document_keys(key, plan, pooling, document)
    sums = running_sum(key)
    block = np.arange(plan.num_blocks)
    before = block - plan.first
    if np.any(before):
        same = (plan.first[:, None] <= block[None]) & (block[None] < block[:, None])
        blocks, broken = finite_rows(key.sum(axis=1))
        earlier = jnp.tensordot(same.astype(key.dtype), blocks, axes=1)
        spoilt = jnp.any(jnp.where(same, broken[None], False), axis=1)
        sums += jnp.where(spoilt[:, None], jnp.nan, earlier)[:, None]
    if pooling == "sum":
        return sums
    counts = before[:, None] * plan.block_size + np.arange(1, key.shape[1] + 1)[None]
    return sums / jnp.asarray(counts, key.dtype)[..., None]


def relevance(
    connector: Float[Array, "n c u"],
    key: Float[Array, "n c k"],
    plan: ReadPlan,
    *,
    gate: str = "content",
    pooling: str = "mean",
    document: Int[Array, "n c"] | None = None,
) -> tuple[Float[Array, "n c r"], Float[Array, "n c"]]:
    """Returns the scores of the states that each token may read, and of the online one.

    Content gates have r_t^(i) = <u_t, p_i>; position gates the logit of the state's distance, that
    of the last one for any farther; uniform gates zero. Slots of ``plan.reads`` that hold no
    bucket score -inf, and so do states of other documents.
    """
    slots = None
    if document is not None and plan.spans_segments.any():
        slots = buckets_of_documents(plan, document)
    pooled = running = None
    if gate == "content":
        running = running_keys(key, plan, pooling, document)
        if document is not None and slots is not None:
            pooled = _slot_keys(key, slots, pooling, document)
        else:
            pooled = pooled_keys(key, plan, pooling, document)
    if slots is None:
        reads, distances = plan.reads, plan.distances
    else:
        reads, distances = jnp.where(slots.after > 0, 0, -1), slots.distances
    cached, online = scores(connector, pooled, running, reads, distances, gate)
    if document is None or not len(plan.buckets):
        return cached, online
    after = plan.buckets[:, 1][np.maximum(plan.reads, 0)] if slots is None else slots.after
    same = document[:, :, None] == document[:, -1][after - 1][:, None]
    return jnp.where(same, cached, -jnp.inf), online


def scores(
    connector: Float[Array, "n c u"],
    pooled: Float[Array, "..."] | None,
    running: Float[Array, "n c k"] | None,
    reads: np.ndarray | Int[Array, "n r"],
    distances: np.ndarray | Int[Array, "n r"],
    gate: str,
) -> tuple[Float[Array, "n c r"], Float[Array, "n c"]]:
    """``relevance`` of blocks, from pooled and running keys and a plan's rows for the blocks.

    Args:
      connector: as for ``relevance``.
      pooled: of content gates, the buckets' pooled keys (buckets, k), or those in the slots of each
        block, (n, r, k).
      running: of content gates, the online state's keys.
      reads: the bucket in each slot, -1 for none.
      distances: of position gates, the distance of each slot's bucket.
      gate: what gates are made from.
    """
    if pooled is not None and running is not None:
        # 0 * NaN is NaN: in a gradient, the keys of states that are not read.
        pooled, broken = finite_rows(pooled)
        if pooled.ndim == 3:
            cached = jnp.einsum("nck,nrk->ncr", connector, pooled, precision="highest")
            cached = jnp.where(broken[:, None], jnp.nan, cached)
        else:
            cached = jnp.einsum("nck,rk->ncr", connector, pooled, precision="highest")
            cached = _in_slots(jnp.where(broken[None, None], jnp.nan, cached), reads)
        online = jnp.vecdot(connector, running, precision="highest")
    elif gate == "position":
        distances = jnp.clip(jnp.asarray(distances), 0, connector.shape[-1] - 1)
        cached = jnp.take_along_axis(connector, distances[:, None], axis=-1)
        online = connector[..., 0]
    else:
        online = jnp.zeros(connector.shape[:2], connector.dtype)
        cached = jnp.zeros((*connector.shape[:2], reads.shape[1]), connector.dtype)
    return jnp.where(jnp.asarray(reads >= 0)[:, None], cached, -jnp.inf), online


def finite_rows(rows: Float[Array, "*r k"]) -> tuple[Float[Array, "*r k"], Bool[Array, "*r"]]:
    """The rows, zero where not all of one is finite, and where that is."""
    finite = jnp.isfinite(rows).all(axis=-1)
    return jnp.where(finite[..., None], rows, 0), ~finite


def _in_slots(
    cached: Float[Array, "n c buckets"], reads: np.ndarray | Int[Array, "n r"]
) -> Float[Array, "n c r"]:
    """The scores of the buckets in each block's slots."""
    if isinstance(reads, np.ndarray) and reads.shape[1] == cached.shape[-1]:
        bucket_of_slot = np.arange(cached.shape[-1])[None]
        if not np.any((reads >= 0) & (reads != bucket_of_slot)):
            return cached
    return jnp.take_along_axis(cached, jnp.maximum(jnp.asarray(reads), 0)[:, None], axis=-1)


def _slot_keys(
    key: Float[Array, "n c k"], slots: DocumentBuckets, pooling: str, document: Int[Array, "n c"]
) -> Float[Array, "n r k"]:
    """``pooled_keys`` of the bucket in each slot, zero where there is none."""
    same = document == document[:, -1:]
    sums, broken = finite_rows(jnp.sum(key, axis=1, where=same[..., None]))
    block = np.arange(len(key))[None, None]
    inside = (slots.first[..., None] <= block) & (block < slots.after[..., None])

    def of_buckets(x: Array) -> Array:
        return jnp.tensordot(inside.astype(key.dtype), x, axes=1, precision="highest")

    pooled = jnp.where(
        (inside & broken[None, None]).any(axis=-1)[..., None], jnp.nan, of_buckets(sums)
    )
    if pooling == "sum":
        return pooled
    counts = of_buckets(same.sum(axis=1).astype(key.dtype))
    return pooled / jnp.maximum(counts, 1)[..., None]


def _running_document_keys(
    key: Float[Array, "n c k"], plan: ReadPlan, pooling: str, document: Int[Array, "n c"]
) -> Float[Array, "n c k"]:
    """``running_keys`` where sums also begin anew with each document."""
    n, c, k = key.shape
    flat = document.reshape(-1)
    begins = flat != jnp.pad(flat[:-1], (1, 0))
    begins = begins.reshape(n, c).at[:, 0].max(plan.begins).reshape(-1)

    def combine(left: tuple, right: tuple) -> tuple:
        begins, sums, counts = right
        before = (jnp.where(begins.reshape(-1, *[1] * (x.ndim - 1)), 0, x) for x in left[1:])
        return left[0] | begins, *(x + y for x, y in zip(before, (sums, counts), strict=True))

    ones = jnp.ones(n * c, key.dtype)
    _, sums, counts = jax.lax.associative_scan(combine, (begins, key.reshape(-1, k), ones))
    sums = sums / counts[:, None] if pooling == "mean" else sums
    return sums.reshape(n, c, k)
