"""Sparse selective caching: an aggregation that reads the few states that a router picks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memcache_jax._checks import check_choice, check_instance, check_integer, set_fields, shown
from memcache_jax._typing import Array, Bool, Float
from memcache_jax.aggregation import GRM, joint_gates
from memcache_jax.engine.exact import read_of_chosen, scores_of_chosen
from memcache_jax.engine.types import Beside, Candidates, OfBlocks, OfTokens, Selection
from memcache_jax.gating import ContentGate, Gate, finite_rows
from memcache_jax.kernels._largest import largest
from memcache_jax.kernels.gate_softmax import softmax_gates
from memcache_jax.kernels.ssc_route import ssc_route
from memcache_jax.tree import Tree


@dataclasses.dataclass(frozen=True)
class SSC(GRM):
    """Sparse selective caching (Eq. 16-17 of arXiv:2602.24281): a router picks the states to read.

    GRM over the live memory and the ``top_k`` most relevant cached states, per token and head; ties
    go to the older state. Reads cost the same however long the sequence is. Of the tokens that
    ``exact`` keeps, only those beside the selected states are read.

    Attributes, beside GRM's:
      top_k: cached states that a token reads.
      inner: ``"grm"`` for the gated sum of reads, ``"soup"`` for the mixture of parameters.
      router: a ``Tree``, to compare a token with about log N pooled keys; None to compare it with
        all N, as the paper does. A tree needs ``Constant`` segments, ``gate="content"``,
        ``num_keys=1`` and a cache with ``policy="error"``. XLA runs it under every
        ``implementation``.

    Raises:
      ValueError: as GRM, for ``top_k`` below 1, an unknown ``inner``, or a router with another
        gate, several keys or ``top_k`` above beam * branching.

    Example:
      >>> import memcache_jax as mc
      >>> mc.SSC(2).inner
      'grm'
      >>> mc.SSC(2, num_keys=4).num_keys  # finds more of the right states
      4
      >>> mc.SSC(2, router=mc.Tree(branching=16, beam=4)).router
      Tree(branching=16, beam=4)
    """

    gate: str | Gate = dataclasses.field(default="content", kw_only=True)
    pooling: str = dataclasses.field(default="mean", kw_only=True)
    top_k: int = 4
    inner: str = "grm"
    router: Tree | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("inner", self.inner, ("grm", "soup"))
        set_fields(self, top_k=check_integer("top_k", self.top_k))
        if self.router is None:
            return
        check_instance("router", self.router, Tree, "an mc.Tree")
        if self.relevance != ContentGate() or self.num_keys > 1:
            raise ValueError(
                "a router with a Tree averages keys: it needs gate='content' and num_keys=1, got "
                f"{shown(self.gate)} and num_keys={self.num_keys}"
            )
        if self.top_k > self.router.beam * self.router.branching:
            raise ValueError(
                f"a router with {self.router} needs top_k of at most beam * branching = "
                f"{self.router.beam * self.router.branching}, got {self.top_k}"
            )

    @property
    def mixes(self) -> bool:
        """Whether parameters are mixed rather than reads."""
        return self.inner == "soup"

    def gates(self, cached: Array, live: Array) -> tuple[Array, Array]:
        """Softmax over the selected states and the live one; zero for the others."""
        return softmax_gates(self._selected(cached), live)

    def gates_with_tokens(
        self, cached: Array, live: Array, tokens: Array
    ) -> tuple[Array, Array, Array]:
        """Softmax over the selected states, their tokens and the live one."""
        cached = self._selected(cached)
        tokens = jnp.where(cached[..., None] > -jnp.inf, tokens, -jnp.inf)
        return joint_gates(softmax_gates, cached, live, tokens)

    def _selected(self, cached: Float[Array, "*r states"]) -> Float[Array, "*r states"]:
        """The relevance of the selected states, -inf for the others."""
        if self.top_k >= cached.shape[-1]:
            return cached
        if self.router is None:
            _, chosen = largest(lax.stop_gradient(cached), self.top_k)
        else:
            chosen = self.router.chosen(self.top_k, lax.stop_gradient(cached))
            chosen = jnp.where(chosen < 0, cached.shape[-1], chosen)
        selected = jnp.zeros(cached.shape, bool)
        selected = jnp.put_along_axis(selected, chosen, True, axis=-1, inplace=False, mode="drop")
        others = jnp.where(_unknown(cached), jnp.nan, -jnp.inf)
        return jnp.where(selected, cached, others)

    def select(
        self,
        connector: Float[Array, "b h n c u"],
        candidates: Candidates,
        *,
        implementation: str | None = None,
    ) -> Selection:
        """Each token's own states, or its block's where these are no more."""
        states = candidates.states
        if self._all_are_few(states):
            selection = super().select(connector, candidates)
            assert isinstance(selection, OfBlocks)
            return selection._replace(unread=selection.unread or self.top_k < states.shape[-1])
        searches = self.router is not None and self.router.levels(states.shape[-1]) > 0
        by_block = not searches and candidates.same_document is None and candidates.counts is None
        by_block &= candidates.exact is None
        routed = type(self) is SSC and self.relevance == ContentGate() and self.num_keys == 1
        if routed and by_block and isinstance(states, np.ndarray):
            keys = candidates.keys(self.pooling)
            assert keys.states is not None
            pooled, broken = finite_rows(keys.states)
            live = keys.live_scores(connector)
            gates, live, chosen = ssc_route(
                connector, pooled, live, states[0], self.top_k, implementation=implementation
            )
            # Which states to select is unknown where a relevance is.
            broken = broken[:, :, np.maximum(states[0], 0)] & (states >= 0)[None]
            gates = jnp.where(broken.any(axis=-1)[..., None, None], jnp.nan, gates)
            return OfTokens(chosen, gates, live)
        if searches:
            assert self.router is not None
            args = self.top_k, connector, candidates, self.pooling
            few, live, chosen = self.router.select(*args)
            slots = jnp.maximum(chosen, 0)
        else:
            cached, live = self._scores(connector, candidates)
            _, slots = largest(lax.stop_gradient(cached), self.top_k)
            chosen = jnp.take_along_axis(jnp.asarray(states)[:, None, :, None], slots, axis=-1)
            few = jnp.take_along_axis(cached, slots, axis=-1)
            few = jnp.where(_unknown(cached), jnp.nan, few)
        exact = candidates.exact
        if exact is None:
            gates, live = self.gates(few, live)
            return OfTokens(jnp.where(gates != 0, chosen, -1), gates, live)
        chosen = jnp.where(few == -jnp.inf, -1, chosen)
        distances = jnp.asarray(candidates.distances)[:, None, :, None]
        distances = jnp.take_along_axis(distances, slots, axis=-1)
        tokens = scores_of_chosen(connector, exact, self.relevance, chosen, distances)
        gates, live, tokens = self.gates_with_tokens(few, live, tokens)
        beside = Beside(tokens.sum(axis=-1), read_of_chosen(exact, chosen, tokens))
        return OfTokens(jnp.where(gates != 0, chosen, -1), gates, live, beside)

    def load(
        self,
        connector: Float[Array, "b h n c u"],
        candidates: Candidates,
        counts: Bool[Array, "n c"],
    ) -> tuple[Float[Array, "b h r"], Float[Array, "b h r"], Float[Array, "b h r"]]:
        """The load of each slot: how often it is selected, its probability, and its tokens.

        Sums over the tokens that see n > ``top_k`` states. Selections are in units of
        ``top_k / n``, probabilities in units of ``1 / n``, as in a balanced router.

        Args:
          connector: as for ``select``.
          candidates: as for ``select``.
          counts: which tokens count.
        """
        cached, _ = self._scores(connector, candidates)
        seen = cached > -jnp.inf
        number = seen.sum(axis=-1, keepdims=True)
        chooses = counts[None, None, :, :, None] & (number > self.top_k)
        probability = jax.nn.softmax(jnp.where(chooses, cached, 0), axis=-1)
        selected = self._selected(lax.stop_gradient(cached)) > -jnp.inf
        counted = chooses & seen

        def total(share: Array) -> Float[Array, "b h r"]:
            return jnp.sum(share, axis=(2, 3), where=counted)

        return (
            total(selected * number / self.top_k),
            total(probability * number),
            total(jnp.ones_like(probability)),
        )

    def _all_are_few(self, states: np.ndarray | Array) -> bool:
        """Whether all that blocks may read is no more than what their tokens would select."""
        if self.top_k >= states.shape[-1]:
            return True
        if not isinstance(states, np.ndarray):
            return False
        return bool(np.sum(states >= 0) <= self.top_k * states.shape[1])


def _unknown(cached: Float[Array, "*r states"]) -> Bool[Array, "*r 1"]:
    """Whether it is unknown which states to select, since a relevance is NaN."""
    return jnp.isnan(cached).any(axis=-1, keepdims=True)
