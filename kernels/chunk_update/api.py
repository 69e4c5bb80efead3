"""Entry point of the chunked update."""

from collections.abc import Callable
from typing import Any

import jax

from memcache_jax.kernels._dispatch import choose, implementations
from memcache_jax.kernels.chunk_update.edges import Edges

_IMPLEMENTATIONS = implementations("chunk_update", "reference", "xla", "pallas_tpu", "pallas_gpu")


def chunk_update(
    chunk: Callable[[Any, Any], tuple[Any, Any]],
    state: Any,
    rows: Any,
    *,
    batch_dims: int,
    implementation: str | None = None,
    late: Any = None,
    edges: Edges | None = None,
) -> tuple[Any, Any]:
    """Carries memories through their chunks: state_{i+1}, y_i = chunk(state_i, rows_i).

    Args:
      chunk: one chunk of one memory: (state, rows) -> (next state, outputs).
      state: the first states, arrays (*batch, ...).
      rows: what is written and read, arrays (*batch, chunks, ...).
      batch_dims: how many leading axes are independent memories.
      implementation: ``"xla"`` (the default), ``"pallas_tpu"``, which traces ``chunk`` in its
        kernels, ``"pallas_gpu"``, for chunks that carry no state, or ``"reference"``.
      late: given if the second axis of the batch is heads and rows (m, k) are tokens, which kernels
        may then read with heads inside: a tree of booleans like the rows, true for those that no
        later state depends on.
      edges: makes the first states from ``state``, of which axes of the batch after the second may
        then be 1 to stand for all, and what is returned of the last ones.

    Returns:
      The last states (*batch, ...) and the outputs (*batch, chunks, ...).

    Raises:
      ValueError: for an unknown implementation.
      NotImplementedError: if the implementation is missing or cannot take these arguments, with the
        reasons.
    """
    update = choose("chunk_update", _IMPLEMENTATIONS, implementation)
    if implementation == "pallas_tpu":
        return update(chunk, state, rows, batch_dims, late, edges or Edges())
    if edges is None:
        return update(chunk, state, rows, batch_dims)
    first = edges.first(state, jax.tree.leaves(rows)[0].shape[:batch_dims])
    ends, y = update(chunk, first, rows, batch_dims)
    return edges.finish(ends), y
