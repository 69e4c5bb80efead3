"""Matrix memories: a state M that is read by one product, M q; kept as M^T (k, v)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from memcache_jax._typing import Apply, Array, Controls, Float, Matrices
from memcache_jax.memories.base import Memory, gated


class MatrixState(NamedTuple):
    """The matrix of one head."""

    matrix: Float[Array, "k v"]


class MatrixChunk(NamedTuple):
    """A chunk of a matrix memory: the state it began with and what it writes."""

    matrix: Float[Array, "k v"]
    key: Float[Array, "m k"]
    value: Float[Array, "m v"]


@dataclasses.dataclass(frozen=True)
class LinearAttention(Memory):
    """Linear attention: M_t = M_{t-1} + v_t k_t^T (Eq. 12 of arXiv:2602.24281).

    It has no controls and no initial weights.

    Example:
      >>> import memcache_jax as mc
      >>> memory = mc.memories.LinearAttention()
      >>> sorted(memory.controls)
      []
    """

    def init(
        self, weights: Mapping[str, Array], key_dim: int, value_dim: int, dtype: Any
    ) -> MatrixState:
        """Returns the zero matrix."""
        del weights
        return MatrixState(jnp.zeros((key_dim, value_dim), dtype))

    def step(
        self,
        state: MatrixState,
        anchor: MatrixState,
        key: Float[Array, "k"],
        value: Float[Array, "v"],
        controls: Controls,
    ) -> MatrixState:
        """Adds the outer product of one token."""
        del anchor, controls
        return MatrixState(state.matrix + jnp.outer(key, value))

    def write(
        self,
        state: MatrixState,
        anchor: MatrixState,
        key: Float[Array, "m k"],
        value: Float[Array, "m v"],
        controls: Controls,
    ) -> tuple[MatrixState, MatrixChunk]:
        """Adds the outer products of a chunk in one matrix product."""
        del anchor, controls
        chunk = MatrixChunk(state.matrix, key, value)
        return MatrixState(state.matrix + jnp.matmul(key.T, value)), chunk

    def apply(self, chunk: MatrixChunk, layer: int, x: Float[Array, "m k"]) -> Array:
        """The state's product with x, plus causal attention without softmax inside the chunk."""
        del layer
        scores = jnp.tril(jnp.matmul(x, chunk.key.T))
        return jnp.matmul(x, chunk.matrix) + jnp.matmul(scores, chunk.value)

    def matrices(self, state: MatrixState) -> Matrices:
        """The matrix itself."""
        return (state.matrix,)

    def forward(
        self, apply: Apply, query: Float[Array, "rows k"], gate: Float[Array, "rows"] | None = None
    ) -> Array:
        """M q."""
        return apply(0, gated(gate, query))
