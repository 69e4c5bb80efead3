"""The gates of all tokens, without a memory."""

import jax.numpy as jnp

from memcache_jax._typing import Array, Float
from memcache_jax.adaptive import Adaptive
from memcache_jax.aggregation import Aggregation
from memcache_jax.engine.borders import adaptive_candidates, find_borders
from memcache_jax.engine.run import candidates_of, cut, widen
from memcache_jax.gating import gates_by_state
from memcache_jax.segmentation import Segmentation


def gates_of_tokens(
    key: Float[Array, "b t h k"],
    connector: Float[Array, "b t h u"] | None,
    border: Float[Array, "b t h"] | None = None,
    *,
    aggregation: Aggregation,
    segmentation: Segmentation,
) -> Float[Array, "b t h states"]:
    """The gates with which ``memory_caching`` weighs the states that each token reads.

    Args:
      key: as for ``memory_caching``.
      connector: as for ``memory_caching``.
      border: as for ``memory_caching``.
      aggregation: what makes the gates.
      segmentation: which states there are.

    Returns:
      In float32 or wider, the gates of the states of ``segmentation.plan(t).buckets``, in that
      order, and last the live memory's. With ``Adaptive`` the states are those of each row's
      finished segments. A state that a token does not read has 0.

    Raises:
      ValueError: for an aggregation with ``exact`` tokens, whose choice depends on the memories,
        and for borders by errors, which depend on them too.
    """
    if aggregation.exact:
        raise ValueError(
            "gates beside exact tokens depend on what memories recall: gates without a memory need "
            f"exact=0, got {aggregation}"
        )
    if isinstance(segmentation, Adaptive) and segmentation.by == "errors":
        raise ValueError(
            "borders by errors depend on what memories recall: gates without a memory need "
            f"segments by keys or by scores, got {segmentation}"
        )
    length = key.shape[1]
    plan = segmentation.plan(length)
    connector = jnp.zeros_like(key) if connector is None else connector
    dtype = jnp.promote_types(jnp.result_type(key, connector), jnp.float32)
    tokens = widen(key, key, key, connector, {}, border, dtype)
    blocks = cut(tokens, None, plan, min(plan.block_size, length), chunk=1)
    keys = blocks.tokens.key, blocks.pooled
    if isinstance(segmentation, Adaptive):
        borders = find_borders(segmentation, tokens.key, None, border=tokens.border)
        candidates = adaptive_candidates(plan, *keys, borders)
    else:
        candidates = candidates_of(plan, *keys)
    selection = aggregation.select(blocks.tokens.connector, candidates)
    cached = gates_by_state(selection, len(plan.buckets))
    gates = jnp.concatenate([cached, selection.live[..., None]], axis=-1)
    gates = gates.reshape(*gates.shape[:2], -1, gates.shape[-1])[:, :, :length]
    return jnp.moveaxis(gates, 1, 2)
