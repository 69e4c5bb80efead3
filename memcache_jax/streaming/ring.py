"""The versions that arrays had at a row's last positions."""

from typing import Any

import jax
import jax.numpy as jnp

from memcache_jax._typing import Array, Bool, Int
from memcache_jax.streaming.storage import Storage


class Ring:
    """Trees of arrays (b, ...) at the last ``size`` positions of each row.

    The version of position p is in place p % size of arrays (b, 1, size, ...), or
    (layers, b, 1, size, ...) where layers share them.

    Attributes:
      size: versions of a row.
      storage: of the versions, as states of one head.
    """

    def __init__(self, size: int, rows: Any, first: Any = None) -> None:
        """Arguments: the size, arrays (b, ...) or their shapes, and the number of the layer."""
        row = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), rows)
        self.size, self.storage = size, Storage(size, row, first)

    def empty(self, rows: int, *layers: int) -> Any:
        """Allocates the arrays, with zeros."""
        return self.storage.empty(rows, *layers)

    def put(
        self, arrays: Any, rows: Any, position: Int[Array, "b n"], counts: Bool[Array, "b n"]
    ) -> Any:
        """The arrays with versions (b, n, ...) of these positions, those that count."""
        place = jnp.where(counts, position % self.size, self.size)
        return self.storage.put(arrays, jax.tree.map(lambda x: x[:, None], rows), place)

    def at(self, arrays: Any, position: Int[Array, "b"]) -> Any:
        """The versions (b, ...) of these positions."""
        place = (position % self.size)[:, None, None]
        return jax.tree.map(lambda x: x[:, 0, 0], self.storage.take(arrays, place))


def where_rows(rows: Bool[Array, "b"], new: Any, old: Any) -> Any:
    """``new`` in the marked rows of arrays (b, ...), ``old`` in the others."""
    return jax.tree.map(
        lambda x, y: jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, y), new, old
    )
