"""A chunk of a matrix memory as an affine map."""

from typing import NamedTuple

from memcache_jax._typing import Array, Float


class AffineChunk(NamedTuple):
    """A chunk as a map of the matrix M (k, v) that it starts from, to the matrix after and reads.

    ::

        e = value - [erase M; 0]
        M' = diag(decay) M + key^T e
        y = query M + scores e

    where ``erase`` may have fewer rows than ``value``, or be None for no row at all.
    """

    decay: Float[Array, "k"]
    value: Float[Array, "writes v"]
    key: Float[Array, "writes k"]
    query: Float[Array, "m k"]
    scores: Float[Array, "m writes"]
    erase: Float[Array, "erasing k"] | None = None
