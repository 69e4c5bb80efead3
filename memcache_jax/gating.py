"""Relevance of memory states to a token: its connector against the states' pooled keys."""

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Float
from memcache_jax.segmentation import ReadPlan


def pooled_keys(key: Float[Array, "n c k"], plan: ReadPlan) -> Float[Array, "buckets k"]:
    """Returns the mean key of each bucket (Eq. 8 of arXiv:2602.24281).

    The paper writes MeanPooling and prints a sum (Eq. 17); a sum grows with the segment and
    saturates the softmax, so the mean is what we take.
    """
    first, after = plan.buckets[:, 0], plan.buckets[:, 1]
    owner = np.repeat(np.arange(len(first)), after - first)
    block = np.concatenate([np.arange(f, a) for f, a in plan.buckets] or [first])
    means = key.mean(axis=1)[block]
    sums = jax.ops.segment_sum(means, owner, num_segments=len(first), indices_are_sorted=True)
    return sums / jnp.asarray(after - first, key.dtype)[:, None]


def running_mean_keys(key: Float[Array, "n c k"]) -> Float[Array, "n c k"]:
    """Returns, for each token, the mean key of its segment up to and including the token."""
    counts = jnp.arange(1, key.shape[1] + 1, dtype=key.dtype)
    return _running_sum(key) / counts[None, :, None]


def relevance(
    connector: Float[Array, "n c k"], key: Float[Array, "n c k"], plan: ReadPlan
) -> tuple[Float[Array, "n c r"], Float[Array, "n c"]]:
    """Returns r_t^(i) = <u_t, p_i> of the states each token may read, and of the online one.

    Slots of ``plan.reads`` that hold no bucket score -inf.
    """
    pooled = pooled_keys(key, plan)
    scores = jnp.einsum("nck,rk->ncr", connector, pooled, precision="highest")
    bucket_of_slot = np.arange(scores.shape[-1])[None]
    if np.any(plan.visible & (plan.reads != bucket_of_slot)):
        scores = jnp.take_along_axis(scores, jnp.asarray(plan.reads)[:, None], axis=-1)
    online = jnp.vecdot(connector, running_mean_keys(key), precision="highest")
    return jnp.where(plan.visible[:, None], scores, -jnp.inf), online


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
