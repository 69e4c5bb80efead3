"""The relevance of segments as its equation."""

import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Float


def relevance(
    connector: Float[Array, "b h n c k"], key: Float[Array, "b h n c k"], pooling: str
) -> tuple[Float[Array, "b h n c r"], Float[Array, "b h n c"]]:
    """See ``api.relevance``."""
    wide = jnp.promote_types(jnp.result_type(connector, key), jnp.float32)
    connector, key = connector.astype(wide), key.astype(wide)
    blocks, size = key.shape[2:4]
    counts = np.arange(1, size + 1) if pooling == "mean" else np.ones(size)
    finite = jnp.isfinite(key)
    whole = finite.all(axis=(3, 4))[:, :, : blocks - 1]
    pooled = jnp.where(finite, key, 0).sum(axis=3)[:, :, : blocks - 1] / counts[-1]
    cached = jnp.einsum("bhnck,bhrk->bhncr", connector, pooled, precision="highest")
    cached = jnp.where(whole[:, :, None, None], cached, jnp.nan)
    before = np.tri(blocks, blocks - 1, k=-1, dtype=bool)
    running = jnp.cumsum(jnp.where(finite, key, 0), axis=3)
    live = jnp.vecdot(connector, running, precision="highest")
    live /= jnp.asarray(counts, wide).reshape(1, 1, 1, -1)
    return jnp.where(before[None, None, :, None], cached, 0), live
