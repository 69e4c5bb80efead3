"""How a token's reads of its live memory and of the cached ones become one output."""

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from memcache_jax._typing import Array, Float, Matrices
from memcache_jax.gating import softmax_gates
from memcache_jax.kernels.bank_read import bank_read
from memcache_jax.memories import Memory
from memcache_jax.segmentation import ReadPlan


class Aggregation(abc.ABC):
    """Gates over the visible states, and the gated sum of their reads.

    y_t = gamma_online M_t(q_t) + sum_i gamma_i M_i(q_t), for one head of one sequence.
    """

    needs_connector: ClassVar[bool]

    @abc.abstractmethod
    def gates(
        self, cached: Float[Array, "... r"], online: Float[Array, "..."]
    ) -> tuple[Float[Array, "... r"], Float[Array, "..."]]:
        """Gates of the cached states and of the online one.

        Args:
          cached: relevance of each cached state, -inf where it is not visible. Without a
            connector it is 0 where a state is visible.
          online: relevance of the online state.
        """

    def combine(
        self,
        memory: Memory,
        bank: Matrices,
        query: Float[Array, "b h n c k"],
        online: Float[Array, "b h n c v"],
        gates: tuple[Float[Array, "b h n c r"], Float[Array, "b h n c"]],
        plan: ReadPlan,
    ) -> Float[Array, "b h n c v"]:
        """The outputs of all tokens, from the reads of the live memory and a bank of states."""
        cached = bank_read(memory.read, bank, query, gates[0], plan.reads)
        return jnp.einsum("bhnc,bhncv->bhncv", gates[1], online) + cached

    def combine_token(
        self, memory: Memory, states: Matrices, query: Float[Array, "k"], gates: Float[Array, "s"]
    ) -> Float[Array, "v"]:
        """The equation itself: one token's output, from states stacked along their first axis."""
        reads = jax.vmap(memory.read, in_axes=(0, None))(states, query[None])[:, 0]
        return jnp.einsum("s,sv->v", gates, reads)


@dataclasses.dataclass(frozen=True)
class Residual(Aggregation):
    """The plain sum of all reads (Eq. 7 of arXiv:2602.24281); it needs no connector.

    Example:
      >>> import memcache_jax as mc
      >>> mc.Residual().needs_connector
      False
    """

    needs_connector: ClassVar[bool] = False

    def gates(
        self, cached: Float[Array, "... r"], online: Float[Array, "..."]
    ) -> tuple[Float[Array, "... r"], Float[Array, "..."]]:
        """One for every visible state."""
        return jnp.where(cached == -jnp.inf, 0.0, 1.0).astype(online.dtype), jnp.ones_like(online)


@dataclasses.dataclass(frozen=True)
class GRM(Aggregation):
    """Gated residual memory (Eq. 9-10 of arXiv:2602.24281): gates by relevance to the token.

    gamma_t = softmax of <u_t, p_i> over the cached states' mean keys p_i and the online state's.

    Attributes:
      gate: ``"content"``, the gate above.

    Raises:
      ValueError: for an unknown gate.

    Example:
      >>> import memcache_jax as mc
      >>> mc.GRM()
      GRM(gate='content')
    """

    gate: str = "content"
    needs_connector: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.gate != "content":
            raise ValueError(f'GRM has gate="content", got gate={self.gate!r}')

    def gates(
        self, cached: Float[Array, "... r"], online: Float[Array, "..."]
    ) -> tuple[Float[Array, "... r"], Float[Array, "..."]]:
        """Softmax of the relevance."""
        return softmax_gates(cached, online)
