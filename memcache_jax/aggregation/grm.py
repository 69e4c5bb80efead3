"""The gated sum of reads, and that of parameters, by a softmax over all visible states."""

import dataclasses

from memcache_jax._checks import check_choice
from memcache_jax._typing import Array, Float
from memcache_jax.aggregation.base import Aggregation
from memcache_jax.gating import softmax_gates

GATES = ("content", "position", "uniform")


@dataclasses.dataclass(frozen=True)
class GRM(Aggregation):
    """Gated residual memory (Eq. 9-10 of arXiv:2602.24281): gates by relevance to the token.

    gamma_t = softmax over the cached states and the online one of <u_t, p_i>, their pooled keys.

    Attributes:
      gate: ``"content"``, the gate above; ``"position"``, softmax of learned logits of a state's
        distance; ``"uniform"``, one over the number of visible states.
      pooling: ``"mean"`` or ``"sum"`` of a bucket's keys. The paper writes MeanPooling and prints a
        sum (Eq. 17), which grows with the segment and saturates the softmax.

    Raises:
      ValueError: for an unknown gate or pooling.

    Example:
      >>> import memcache_jax as mc
      >>> mc.GRM()
      GRM(gate='content', pooling='mean')
    """

    gate: str = "content"
    pooling: str = "mean"

    def __post_init__(self) -> None:
        check_choice("gate", self.gate, GATES)
        check_choice("pooling", self.pooling, ("mean", "sum"))

    def gates(
        self, cached: Float[Array, "... r"], online: Float[Array, "..."]
    ) -> tuple[Float[Array, "... r"], Float[Array, "..."]]:
        """Softmax of the relevance."""
        return softmax_gates(cached, online)


@dataclasses.dataclass(frozen=True)
class Soup(GRM):
    """Memory soup (Eq. 14-15 of arXiv:2602.24281): one read of a mixture of the memories.

    Every matrix of M* is the sum of the visible states' matrices, weighed by GRM's gates. For
    memories of one layer that is GRM; for deeper ones it is not. The mixture is never formed.

    Attributes:
      gate: as GRM's.
      pooling: as GRM's.

    Example:
      >>> import memcache_jax as mc
      >>> mc.Soup()
      Soup(gate='content', pooling='mean')
    """

    @property
    def mixes(self) -> bool:
        """True."""
        return True
