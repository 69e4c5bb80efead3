"""Relevance of memory states to a token: its connector against the states' pooled keys."""

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Float
from memcache_jax.segmentation import ReadPlan


def pooled_keys(
    key: Float[Array, "n c k"], plan: ReadPlan, pooling: str = "mean"
) -> Float[Array, "buckets k"]:
    """Returns the mean or the sum of each bucket's keys (Eq. 8 of arXiv:2602.24281)."""
    first, after = plan.buckets[:, 0], plan.buckets[:, 1]
    owner = np.repeat(np.arange(len(first)), after - first)
    block = np.concatenate([np.arange(f, a) for f, a in plan.buckets] or [first])
    blocks = (key.mean(axis=1) if pooling == "mean" else key.sum(axis=1))[block]
    sums = jax.ops.segment_sum(blocks, owner, num_segments=len(first), indices_are_sorted=True)
    return sums / jnp.asarray(after - first, key.dtype)[:, None] if pooling == "mean" else sums


def running_keys(
    key: Float[Array, "n c k"], plan: ReadPlan, pooling: str = "mean"
) -> Float[Array, "n c k"]:
    """Returns, for each token, the mean or sum of its segment's keys, up to and with its own."""
    sums = _running_sum(key)
    block = np.arange(plan.num_blocks)
    before = block - plan.first
    if np.any(before):
        same = (plan.first[:, None] <= block[None]) & (block[None] < block[:, None])
        sums += jnp.tensordot(same.astype(key.dtype), key.sum(axis=1), axes=1)[:, None]
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
) -> tuple[Float[Array, "n c r"], Float[Array, "n c"]]:
    """Returns the scores of the states that each token may read, and of the online one.

    Content gates have r_t^(i) = <u_t, p_i>; position gates the logit of the state's distance, that
    of the last one for any farther; uniform gates zero. Slots of ``plan.reads`` that hold no
    bucket score -inf.
    """
    if gate == "content":
        cached = jnp.einsum(
            "nck,rk->ncr", connector, pooled_keys(key, plan, pooling), precision="highest"
        )
        bucket_of_slot = np.arange(cached.shape[-1])[None]
        if plan.reads.shape[1] != cached.shape[-1] or np.any(
            plan.visible & (plan.reads != bucket_of_slot)
        ):
            reads = jnp.asarray(np.maximum(plan.reads, 0))[:, None]
            cached = jnp.take_along_axis(cached, reads, axis=-1)
        online = jnp.vecdot(connector, running_keys(key, plan, pooling), precision="highest")
    elif gate == "position":
        distance = np.clip(plan.distances, 0, connector.shape[-1] - 1)
        cached = jnp.take_along_axis(connector, jnp.asarray(distance)[:, None], axis=-1)
        online = connector[..., 0]
    else:
        online = jnp.zeros(key.shape[:2], key.dtype)
        cached = jnp.zeros((*key.shape[:2], plan.reads.shape[1]), key.dtype)
    return jnp.where(plan.visible[:, None], cached, -jnp.inf), online


def softmax_gates(
    cached: Float[Array, "... r"], online: Float[Array, "..."]
) -> tuple[Float[Array, "... r"], Float[Array, "..."]]:
    """Softmax over the visible cached states and the online one together (Eq. 10)."""
    gates = jax.nn.softmax(jnp.concatenate([cached, online[..., None]], axis=-1), axis=-1)
    return gates[..., :-1], gates[..., -1]


def _running_sum(x: Float[Array, "n c k"], width: int = 16) -> Float[Array, "n c k"]:
    """Cumulative sum over c in two levels: ``jnp.cumsum`` of the whole axis is slow on CPU."""
    n, c, k = x.shape
    rows = jnp.pad(x, ((0, 0), (0, -c % width), (0, 0))).reshape(n, -1, width, k)
    inner = jnp.einsum("ij,nwjk->nwik", jnp.tri(width, dtype=x.dtype), rows, precision="highest")
    before = jnp.cumsum(inner[:, :, -1], axis=1) - inner[:, :, -1]
    return (inner + before[:, :, None]).reshape(n, -1, k)[:, :c]
