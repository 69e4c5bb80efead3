"""How evenly a router spreads tokens over the states that they may read."""

import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Float, Int
from memcache_jax.adaptive import Adaptive
from memcache_jax.engine.documents import count_documents
from memcache_jax.engine.run import candidates_in, cut, widen, with_pooled
from memcache_jax.segmentation import Segmentation
from memcache_jax.sparse import SSC


def load_of_tokens(
    key: Float[Array, "b t h k"],
    connector: Float[Array, "b t h u"],
    document_ids: Int[Array, "b t"] | None = None,
    pooled: Float[Array, "b h states k"] | None = None,
    *,
    aggregation: SSC,
    segmentation: Segmentation,
) -> tuple[Float[Array, "b h r"], Float[Array, "b h r"], Float[Array, "b h r"]]:
    """``SSC.load`` for the tokens of a call of ``memory_caching``.

    Args:
      key: as for ``memory_caching``.
      connector: as for ``memory_caching``.
      document_ids: as for ``memory_caching``.
      pooled: the pooled keys of the states, if these are another layer's.
      aggregation: the router.
      segmentation: how segments divide the tokens.

    Raises:
      ValueError: for ``Adaptive`` segments.
    """
    if isinstance(segmentation, Adaptive):
        raise ValueError(
            f"RouterLoss needs segments with a fixed plan, such as Constant(C), got {segmentation}"
        )
    length = key.shape[1]
    plan = segmentation.plan(length)
    dtype = jnp.promote_types(jnp.result_type(key, connector), jnp.float32)
    tokens = widen(key, key, key, connector, {}, dtype=dtype)
    document = None if document_ids is None else count_documents(document_ids)
    size = min(plan.block_size, length)
    blocks = cut(tokens, document, plan, size, chunk=1)
    candidates = candidates_in(plan, blocks)
    if pooled is not None:
        candidates = with_pooled(candidates, pooled)
    counts = np.arange(plan.num_blocks * size).reshape(-1, size) < length
    return aggregation.load(blocks.tokens.connector, candidates, jnp.asarray(counts))


def balance(
    selected: Float[Array, "b h r"],
    probability: Float[Array, "b h r"],
    tokens: Float[Array, "b h r"],
) -> Float[Array, ""]:
    """The loss of ``RouterLoss`` from the sums of ``SSC.load``; 0 if no token has a choice."""
    selected, probability, tokens = (x.sum(axis=0) for x in (selected, probability, tokens))
    products = selected * probability / jnp.maximum(tokens, 1)
    return (products.sum(axis=-1) / jnp.maximum(tokens.sum(axis=-1), 1)).mean()
