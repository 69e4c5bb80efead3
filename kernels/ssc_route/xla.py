"""The routing in plain XLA: the relevance of every state to every token, then the top k."""

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Float, Int
from memcache_jax.kernels._largest import largest
from memcache_jax.kernels.ssc_route._shared import slots_are_states


def ssc_route(
    connector: Float[Array, "b h n c u"],
    pooled: Float[Array, "b h buckets u"],
    online: Float[Array, "b h n c"],
    reads: np.ndarray,
    top_k: int,
) -> tuple[Float[Array, "b h n c s"], Float[Array, "b h n c"], Int[Array, "b h n c s"]]:
    """See ``api.ssc_route``."""
    cached = jnp.einsum("bhnck,bhrk->bhncr", connector, pooled, precision="highest")
    of_slot = np.maximum(reads, 0)[None, None, :, None]
    if not slots_are_states(reads, pooled.shape[2]):
        cached = jnp.take_along_axis(cached, jnp.asarray(of_slot), axis=-1)
    cached = jnp.where((reads >= 0)[None, None, :, None], cached, -jnp.inf)
    missing = max(0, top_k - reads.shape[1])
    ends = [(0, 0)] * 4 + [(0, missing)]
    cached = jnp.pad(cached, ends, constant_values=-jnp.inf)
    selected, slots = largest(cached, top_k)
    gates = jax.nn.softmax(jnp.concatenate([selected, online[..., None]], axis=-1), axis=-1)
    states = jnp.take_along_axis(jnp.asarray(np.pad(of_slot, ends), jnp.int32), slots, axis=-1)
    return gates[..., :-1], gates[..., -1], jnp.where(selected > -jnp.inf, states, -1)
