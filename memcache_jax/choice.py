"""What SSC chose for each token, as numbers that another layer takes in place of a connector."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import lax

from memcache_jax._typing import Array, Float
from memcache_jax.engine.types import Candidates, OfBlocks, OfTokens, Selection
from memcache_jax.gating import Gate
from memcache_jax.kernels._largest import largest
from memcache_jax.sparse import SSC


def choice_of(selection: Selection, top_k: int) -> Float[Array, "b h n c u"]:
    """The numbers of a token's ``top_k`` states, -1 for none, their gates, and the live one's."""
    states, gates = jnp.asarray(selection.states), selection.gates
    if isinstance(selection, OfBlocks):
        states = jnp.broadcast_to(states[:, None, :, None], gates.shape)
    if gates.shape[-1] > top_k:  # of which all but top_k are zero
        _, place = largest(lax.stop_gradient(gates), top_k)
        states, gates = (jnp.take_along_axis(x, place, axis=-1) for x in (states, gates))
    missing = [(0, 0)] * 4 + [(0, top_k - gates.shape[-1])]
    states = jnp.pad(states, missing, constant_values=-1).astype(gates.dtype)
    return jnp.concatenate([states, jnp.pad(gates, missing), selection.live[..., None]], axis=-1)


@dataclasses.dataclass(frozen=True)
class _Chosen(Gate):
    """No relevance: gates come with the choice."""

    connector = "distances"  # as many numbers as there are
    reads_keys: ClassVar[bool] = False

    def score(self, connector: Array, key: Array, distance: Array) -> Array:
        """Refuses, since nothing is scored."""
        raise NotImplementedError("another layer's choice has no scores")


class FollowingSSC(SSC):
    """SSC that reads what another layer chose, with that layer's gates; see ``choice_of``."""

    @property
    def relevance(self) -> Gate:
        """None of its own."""
        return _Chosen()

    def select(
        self,
        connector: Float[Array, "b h n c u"],
        candidates: Candidates,
        *,
        implementation: str | None = None,
    ) -> Selection:
        """The choice that is passed as the connector."""
        del implementation
        states, gates, live = jnp.split(connector, [self.top_k, 2 * self.top_k], axis=-1)
        live = live[..., 0]
        if not candidates.states.shape[-1]:
            return OfBlocks(candidates.states, gates[..., :0], live)
        states = jnp.where(gates != 0, lax.stop_gradient(states).astype(np.int32), -1)
        return OfTokens(states, gates, live)
