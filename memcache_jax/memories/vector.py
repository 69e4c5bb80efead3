"""A memory that is one vector: the last value."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp

from memcache_jax._typing import Apply, Array, Bool, Controls, Float, Matrices
from memcache_jax.kernels.bands import gated
from memcache_jax.memories.base import Memory


class VectorState(NamedTuple):
    """The value last written."""

    value: Float[Array, "v"]


@dataclasses.dataclass(frozen=True)
class Vector(Memory):
    """M_t = v_t, and a read returns M_t whatever the query (Eq. 18-20 of arXiv:2602.24281).

    With segments of one token, GRM over it is causal softmax attention with the connector as query.

    Example:
      >>> import jax, memcache_jax as mc
      >>> q, k, v, u = jax.random.normal(jax.random.key(0), (4, 1, 10, 2, 8))
      >>> y = mc.memory_caching(q, k, v, u, memory=mc.memories.Vector(), aggregation=mc.GRM(),
      ...                       segmentation=mc.Constant(1))
      >>> attention = jax.nn.dot_product_attention(u, k, v, is_causal=True, scale=1.0)
      >>> bool(abs(y - attention).max() < 1e-5)
      True
    """

    reads_query: ClassVar[bool] = False
    accumulates: ClassVar[bool] = False
    takes_padding: ClassVar[bool] = True

    def init(
        self, weights: Mapping[str, Array], key_dim: int, value_dim: int, dtype: Any
    ) -> VectorState:
        """Returns zero."""
        del weights, key_dim
        return VectorState(jnp.zeros(value_dim, dtype))

    def step(self, state, anchor, key, value, controls) -> VectorState:
        """Takes the token's value."""
        del state, anchor, key, controls
        return VectorState(value)

    def write(self, state, anchor, key, value, controls) -> tuple[VectorState, Float[Array, "m v"]]:
        """Takes the last value; the chunk is its values."""
        del state, anchor, key, controls
        return VectorState(value[-1]), value

    def without_padding(self, state, key, value, count) -> VectorState:
        """The last value before the zeros."""
        del state, key
        return VectorState(value[count - 1])

    def forgetting(self, controls: Controls, begins: Bool[Array, "m"]) -> Controls:
        """Nothing to do: every token forgets."""
        del begins
        return controls

    def apply(self, chunk: Float[Array, "m v"], layer: int, x: Float[Array, "m 1"]) -> Array:
        """Each token's value, times x."""
        del layer
        return x * chunk

    def matrices(self, state: VectorState) -> Matrices:
        """The value, as a matrix of one row."""
        return (state.value[..., None, :],)

    def forward(
        self, apply: Apply, query: Float[Array, "*rows k"], gate: Float[Array, "rows"] | None = None
    ) -> Array:
        """M, whatever the query."""
        return apply(0, gated(gate, jnp.ones((*query.shape[:-1], 1), query.dtype)))
