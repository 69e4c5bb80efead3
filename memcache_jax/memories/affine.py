"""Memories whose chunks are affine maps of one matrix."""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp

from memcache_jax._typing import Apply, Array, Controls, Float, Matrices, State
from memcache_jax.kernels.affine_update import AffineChunk
from memcache_jax.kernels.bands import gated
from memcache_jax.memories.base import Form, Memory


class MatrixState(NamedTuple):
    """The matrix of one head, M^T."""

    matrix: Float[Array, "k v"]


class MappedChunk(NamedTuple):
    """A chunk and the state that it starts from, for reads through the chunk's map."""

    state: State
    key: Float[Array, "m k"]
    value: Float[Array, "m v"]
    controls: Controls


class AffineMemory(Memory):
    """A memory of one matrix M, zero at first, that each chunk maps to A M + B, read by M q.

    A rule derives from it and gives ``step``, the equation of one token, and ``affine``, the map of
    a chunk. ``write`` and ``apply``, the kernels and all chunks at once follow from the map; a rule
    may override the first two where it can do with less. The state is a NamedTuple with the field
    ``matrix`` (k, v), M transposed, so that a read is ``query @ matrix``; a rule that keeps
    anything else besides overrides ``init`` and ``carried``.
    """

    form: ClassVar[Form] = "affine"
    fixed: ClassVar[tuple[str, ...]] = (
        *("forward", "matrices", "read", "read_online", "write_documents"),
    )

    @abc.abstractmethod
    def affine(
        self,
        before: State,
        key: Float[Array, "m k"],
        value: Float[Array, "m v"],
        query: Float[Array, "m k"],
        controls: Controls,
    ) -> AffineChunk:
        """A chunk's write and its tokens' reads, as a map of the matrix that it starts from.

        Args:
          before: the state before the chunk, with a zero matrix.
          key: as for ``write``.
          value: as for ``write``.
          query: each row reads right after its token's write.
          controls: as for ``write``.
        """

    def carried(self, key: Float[Array, "m k"], value: Float[Array, "m v"]) -> State:
        """The state after a chunk, with a zero matrix: all that does not depend on the matrix."""
        return self.init({}, key.shape[-1], value.shape[-1], key.dtype)

    def init(self, weights: Mapping[str, Array], key_dim: int, value_dim: int, dtype: Any) -> Any:
        """Returns the zero matrix."""
        del weights
        return MatrixState(jnp.zeros((key_dim, value_dim), dtype))

    def write(
        self,
        state: Any,
        anchor: Any,
        key: Float[Array, "m k"],
        value: Float[Array, "m v"],
        controls: Controls,
    ) -> tuple[Any, Any]:
        """Applies the chunk's map."""
        del anchor
        chunk = MappedChunk(state, key, value, controls)
        matrix, _ = self._mapped(chunk, key)
        return self.carried(key, value)._replace(matrix=matrix), chunk

    def apply(self, chunk: Any, layer: int, x: Float[Array, "m k"]) -> Array:
        """The product of M_t with row t of x."""
        del layer
        return self._mapped(chunk, x)[1]

    def _mapped(self, chunk: MappedChunk, x: Float[Array, "m k"]) -> tuple[Array, Array]:
        """The matrix after the chunk, and the reads of x."""
        state, key, value, controls = chunk
        before = state._replace(matrix=jnp.zeros_like(state.matrix))
        return self.affine(before, key, value, x, controls)(state.matrix)

    def matrices(self, state: Any) -> Matrices:
        """The matrix itself."""
        return (state.matrix,)

    def forward(
        self, apply: Apply, query: Float[Array, "*rows k"], gate: Float[Array, "rows"] | None = None
    ) -> Array:
        """M q."""
        return apply(0, gated(gate, query))
