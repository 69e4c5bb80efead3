"""The gates of every token over all states of a sequence, to look at."""

import jax
import jax.numpy as jnp

from memcache_jax._typing import Array, Float
from memcache_jax.aggregation import Aggregation
from memcache_jax.segmentation import Segmentation


def gates_of_states(
    key: Float[Array, "b t h k"],
    connector: Float[Array, "b t h u"] | None,
    *,
    aggregation: Aggregation,
    segmentation: Segmentation,
) -> Float[Array, "b t h states"]:
    """The gates with which ``memory_caching`` weighs the states that each token reads.

    Args:
      key: as for ``memory_caching``.
      connector: as for ``memory_caching``.
      aggregation: what makes the gates.
      segmentation: which states there are.

    Returns:
      In float32 or wider, the gates of the states of ``segmentation.plan(t).buckets``, in that
      order, and last the live state's. A state that a token does not read has 0.
    """
    connector = jnp.zeros_like(key) if connector is None else connector
    dtype = jnp.promote_types(jnp.result_type(key, connector), jnp.float32)
    length = key.shape[1]
    plan = segmentation.plan(length)
    block = min(plan.block_size, length)

    def split(x: Array) -> Float[Array, "b h n c _"]:
        x = jnp.moveaxis(x.astype(dtype), 2, 1)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, plan.num_blocks * block - length), (0, 0)))
        return x.reshape(*x.shape[:2], plan.num_blocks, block, -1)

    (cached, live), reads = aggregation.weigh(split(connector), split(key), plan, None, plan.reads)
    states = len(plan.buckets)
    places = jnp.asarray(reads)
    if places.ndim == 2:  # of a block, else of a token
        places = places[None, None, :, None]
    places = jnp.broadcast_to(jnp.where(places < 0, states, places), cached.shape)

    def spread(gates: Float[Array, "r"], places: Array) -> Float[Array, "states"]:
        return jnp.zeros(states, dtype).at[places].add(gates, mode="drop")

    shape = live.size, cached.shape[-1]
    rows = jax.vmap(spread)(cached.reshape(shape), places.reshape(shape))
    gates = jnp.concatenate([rows.reshape(*live.shape, states), live[..., None]], axis=-1)
    gates = gates.reshape(*gates.shape[:2], -1, states + 1)[:, :, :length]
    return jnp.moveaxis(gates, 1, 2)
