"""Memories whose chunks are affine maps of one matrix."""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp

from memcache_jax._typing import Apply, Array, Controls, Float, Matrices, State
from memcache_jax.kernels.affine_update import AffineChunk
from memcache_jax.kernels.bands import gated
from memcache_jax.memories.base import Form, Memory, Run, owner_of

MAP_PRECISION = "highest"
"""Of products that make the maps of runs within their chunks, and that compose them.

Maps are kept in float32 or wider, and a run may have millions of tokens: at the default precision
of accelerators each product would round float32 to bfloat16 or TensorFloat-32, and the errors add
up. ``jax.default_matmul_precision`` does not reach these products; it holds for all that is written
and read without a map.
"""


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
    anything else besides overrides ``init`` and ``carried``; it merges if it also overrides
    ``compose``.

    Any run of tokens is such a map too, and two of them compose to one: (A2, B2) o (A1, B1) =
    (A2 A1, A2 B1 + B2). A is kept as its diagonal where a rule states ``erases = False``.
    """

    form: ClassVar[Form] = "affine"
    merges: ClassVar[bool] = True
    fixed: ClassVar[tuple[str, ...]] = (
        *("forward", "matrices", "read", "read_online", "write_documents"),
    )

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # What is carried beside the matrix enters the next run in a way that only the rule knows.
        own = {name: owner_of(cls, name) is not AffineMemory for name in ("carried", "compose")}
        if own["carried"] and not own["compose"]:
            if vars(cls).get("merges"):
                raise TypeError(
                    f"{cls.__name__} overrides carried: merges = True needs compose too"
                )
            cls.merges = False

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

    def identity(self, key_dim: int, dtype: Any) -> Any:
        """A = I, as its diagonal where nothing erases."""
        return jnp.eye(key_dim, dtype=dtype) if self.erases else jnp.ones(key_dim, dtype)

    def extended(self, transition, key, value, controls) -> Any:
        """A' = diag(decay) A - key^T (erase A), with the chunk's map."""
        before = self.init({}, key.shape[-1], value.shape[-1], key.dtype)
        form = self.affine(before, key, value, key, controls)
        if not self.erases:
            if form.erase is not None:
                raise TypeError(f"{type(self).__name__} states erases = False, but its map erases")
            return form.decay * transition
        kept = form.decay[:, None] * transition
        if form.erase is None:
            return kept
        return kept - _product(form.key[: len(form.erase)].T, _product(form.erase, transition))

    def compose(self, first: Run, then: Run) -> Run:
        """M -> A2 (A1 M + B1) + B2."""
        matrix = through(then.transition, first.state.matrix) + then.state.matrix
        transition = first.transition
        if transition is not None:
            transition = through(then.transition, transition)
        return Run(then.state._replace(matrix=matrix), transition)

    def matrices(self, state: Any) -> Matrices:
        """The matrix itself."""
        return (state.matrix,)

    def forward(
        self, apply: Apply, query: Float[Array, "*rows k"], gate: Float[Array, "rows"] | None = None
    ) -> Array:
        """M q."""
        return apply(0, gated(gate, query))


def through(transition: Array, x: Array) -> Array:
    """The product of A, or of the diagonal matrix with this diagonal, with a matrix or diagonal."""
    if transition.ndim == 2:
        return _product(transition, x)
    return transition.reshape(-1, *[1] * (x.ndim - 1)) * x


def _product(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision=MAP_PRECISION)
