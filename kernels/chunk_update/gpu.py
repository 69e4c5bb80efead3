"""The chunked update on GPUs, for chunks that carry no state: all run side by side.

The affine update carries matrix memories, and the deep update deep ones.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from memcache_jax.kernels._dispatch import check_served
from memcache_jax.kernels.chunk_update import xla


def chunk_update(
    chunk: Callable[[Any, Any], tuple[Any, Any]], state: Any, rows: Any, batch_dims: int
) -> tuple[Any, Any]:
    """See ``api.chunk_update``."""
    shapes = [x.shape[batch_dims:] for x in jax.tree.leaves(state)]
    reason = f"a state {shapes} of a memory that is neither deep nor an affine map of a matrix"
    check_served("chunk_update", "pallas_gpu", [(bool(shapes), reason)])
    alone = jax.tree.map(lambda x: jnp.expand_dims(x, batch_dims + 1), rows)
    _, y = xla.chunk_update(chunk, state, alone, batch_dims + 1)
    return state, jax.tree.map(lambda x: jnp.squeeze(x, batch_dims + 1), y)
