"""The routing as its equation, token by token."""

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Float, Int
from memcache_jax.kernels._largest import largest


def ssc_route(
    connector: Float[Array, "b h n c u"],
    pooled: Float[Array, "b h buckets u"],
    online: Float[Array, "b h n c"],
    reads: np.ndarray,
    top_k: int,
) -> tuple[Float[Array, "b h n c s"], Float[Array, "b h n c"], Int[Array, "b h n c s"]]:
    """See ``api.ssc_route``."""
    reads = np.pad(reads, ((0, 0), (0, max(0, top_k - reads.shape[1]))), constant_values=-1)
    pooled = jnp.pad(pooled, ((0, 0), (0, 0), (0, 1), (0, 0)))  # there may be no state

    def unit(connector, pooled, online):
        def token(connector, online, reads):
            cached = jnp.matmul(pooled[jnp.maximum(reads, 0)], connector, precision="highest")
            cached = jnp.where(reads >= 0, cached, -jnp.inf)
            selected, slots = largest(cached, top_k)
            gates = jax.nn.softmax(jnp.append(selected, online))
            return gates[:-1], gates[-1], jnp.where(selected > -jnp.inf, reads[slots], -1)

        block = jax.vmap(token, in_axes=(0, 0, None))
        return jax.vmap(block)(connector, online, jnp.asarray(reads, jnp.int32))

    return jax.vmap(jax.vmap(unit))(connector, pooled, online)
