"""The chunked update as a plain scan, differentiated by JAX."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def chunk_update(
    chunk: Callable[[Any, Any], tuple[Any, Any]], state: Any, rows: Any, batch_dims: int
) -> tuple[Any, Any]:
    """See ``api.chunk_update``."""

    def unit(state: Any, rows: Any) -> tuple[Any, Any]:
        return lax.scan(chunk, state, rows)

    for _ in range(batch_dims):
        unit = jax.vmap(unit)
    return unit(state, rows)
