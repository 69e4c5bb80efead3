"""Entry point of the affine update."""

from collections.abc import Callable
from typing import Any

import jax

from memcache_jax._typing import Array
from memcache_jax.kernels._dispatch import choose, implementations
from memcache_jax.kernels.affine_update.form import AffineChunk, OnChip

_IMPLEMENTATIONS = implementations("affine_update", "reference", "xla", "pallas_tpu", "pallas_gpu")
_ON_CHIP = implementations("affine_update", "pallas_tpu_chunks")


def affine_update(
    chunk: Callable[[Any], AffineChunk],
    state: Array | None,
    rows: Any,
    *,
    batch_dims: int,
    keep: int,
    implementation: str | None,
    on_chip: OnChip | None = None,
) -> tuple[Array, Array]:
    """Carries matrices through chunks, each an affine map of the matrix.

    Only the matrices themselves need the recurrence; all else is computed for all chunks side by
    side.

    Args:
      chunk: makes the map of one chunk from its rows.
      state: the first matrices, (*batch, k, v); None for zeros.
      rows: the rows of all chunks, arrays (*batch, chunks, ...).
      batch_dims: how many leading axes are independent matrices.
      keep: chunks from one returned matrix to the next, a divisor of the number of chunks.
      implementation: ``"xla"`` (the default), ``"pallas_tpu"``, ``"pallas_gpu"`` or
        ``"reference"``.
      on_chip: only for ``"pallas_tpu"`` and a ``chunk`` that kernels can trace: the kernels make
        the maps, and read rows in bfloat16 as well. With None all maps are made before the
        kernels run.

    Returns:
      The matrices after every ``keep`` chunks (*batch, chunks // keep, k, v), and what the chunks
      read (*batch, chunks, m, v).

    Raises:
      ValueError: for an unknown implementation, or a ``keep`` that does not divide the chunks.
      NotImplementedError: if the implementation is missing or cannot take these arguments, with the
        reasons.
    """
    update = choose("affine_update", _IMPLEMENTATIONS, implementation)
    chunks = jax.tree.leaves(rows)[0].shape[batch_dims]
    if chunks % keep:
        raise ValueError(f"keep must divide the number of chunks, got keep={keep} of {chunks}")
    if on_chip is not None:
        assert implementation == "pallas_tpu"
        return _ON_CHIP["pallas_tpu_chunks"](chunk, state, rows, batch_dims, keep, on_chip)
    return update(chunk, state, rows, batch_dims, keep)
