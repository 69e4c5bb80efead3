"""A chunk of a matrix memory as an affine map."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from memcache_jax._typing import Array, Float


class AffineChunk(NamedTuple):
    """A chunk as a map from the matrix M (k, v) before it to the matrix M' after it and reads y.

    ::

        e = value - [erase M; 0]
        M' = diag(decay) M + key^T e
        y = query M + scores e

    ``erase`` may have fewer rows than ``value``, or be None.
    """

    decay: Float[Array, "k"]
    value: Float[Array, "writes v"]
    key: Float[Array, "writes k"]
    query: Float[Array, "m k"]
    scores: Float[Array, "m writes"]
    erase: Float[Array, "erasing k"] | None = None

    def __call__(self, matrix: Float[Array, "k v"]) -> tuple[Array, Array]:
        """The matrix after the chunk, and what its rows read."""
        written = self.value
        if self.erase is not None:
            written = written.at[: len(self.erase)].add(-jnp.matmul(self.erase, matrix))
        after = self.decay[:, None] * matrix + jnp.matmul(self.key.T, written)
        return after, jnp.matmul(self.query, matrix) + jnp.matmul(self.scores, written)


class OnChip(NamedTuple):
    """What kernels that make the maps themselves need.

    Attributes:
      dtype: the dtype of what the chunks read.
      late: a tree of booleans like the rows, true for those that no later matrix depends on.
      spoilt: numbers (*batch, chunks, m), nonzero for the rows whose reads are NaN and have no
        gradient; None if there are none.
    """

    dtype: DTypeLike
    late: Any
    spoilt: Array | None = None


def empty_matrices(chunk: Callable[[Any], AffineChunk], rows: Any, batch_dims: int) -> Array:
    """Zero matrices (*batch, k, v) for ``chunk`` to map, given its rows (*batch, chunks, ...)."""
    batch = jax.tree.leaves(rows)[0].shape[:batch_dims]
    row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[batch_dims + 1 :], x.dtype), rows)
    form = jax.eval_shape(chunk, row)
    return jnp.zeros((*batch, *form.decay.shape, form.value.shape[-1]), form.value.dtype)
