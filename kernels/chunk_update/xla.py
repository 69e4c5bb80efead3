"""The chunked update in plain XLA, with a backward pass that recomputes.

The forward pass keeps the state that each chunk starts from and nothing else; the backward pass
walks the chunks in reverse and differentiates each one again from its start.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from memcache_jax.kernels._dispatch import for_each_unit, written


def chunk_update(
    chunk: Callable[[Any, Any], tuple[Any, Any]], state: Any, rows: Any, batch_dims: int
) -> tuple[Any, Any]:
    """See ``api.chunk_update``."""

    @jax.custom_vjp
    def update(state, rows):
        return for_each_unit(lambda s, r: lax.scan(chunk, s, r), batch_dims)(state, rows)

    def forward(state, rows):
        def keep_start(state, rows):
            end, y = chunk(state, rows)
            return end, (y, state)

        def unit(state, rows):
            return lax.scan(keep_start, state, rows)

        end, (y, starts) = written(for_each_unit(unit, batch_dims)(state, rows))
        return (end, y), (starts, rows)

    def backward(residuals, cotangents):
        def pull_chunk(d_state, xs):
            start, rows, d_y = xs
            _, pull = jax.vjp(chunk, start, rows)
            return pull((d_state, d_y))

        def unit(starts, rows, d_end, d_y):
            return lax.scan(pull_chunk, d_end, (starts, rows, d_y), reverse=True)

        return for_each_unit(unit, batch_dims)(*residuals, *cotangents)

    update.defvjp(forward, backward)
    return update(state, rows)
