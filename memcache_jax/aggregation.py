"""How a token's reads of its live memory and of the cached states become one output."""

import abc
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from memcache_jax._checks import check_choice, check_integer, set_fields, shown
from memcache_jax._typing import Array, Float, Matrices
from memcache_jax.engine.exact import read_of_tokens, scores_of_tokens
from memcache_jax.engine.read import Bank, Live
from memcache_jax.engine.types import Beside, Candidates, LivePart, OfBlocks, Selection
from memcache_jax.gating import GATES, Gate, scores
from memcache_jax.kernels.gate_softmax import softmax_gates
from memcache_jax.memories import Memory


class Aggregation(abc.ABC):
    """Gates over the visible states, and what they weigh: reads, or the memories' parameters.

    For one head of one sequence, y_t = gamma_live M_t(q_t) + sum_i gamma_i M_i(q_t), or with
    ``mixes``, y_t = M*(q_t) where each matrix of M* is that sum of the states' matrices.

    A new one implements ``gates``. One that chooses states itself overrides ``select``, and one
    that reads in another way ``needs``, ``read`` and ``read_token``: they serve whole sequences,
    parts on a mesh, and streams.

    Attributes:
      gate: a ``Gate`` or its name: ``"content"``, the connector against the states' pooled keys;
        ``"position"``, logits of each distance in segments, passed as the connector (b, t, h,
        distances), the live memory's first; or ``"uniform"``.
      pooling: whether pooled keys are the ``"mean"`` or the ``"sum"`` of a bucket's keys.
      num_keys: pooled keys per state, one for each equal span of its tokens.
      exact: tokens kept beside each cached state, see ``GRM``.
    """

    gate: str | Gate = "uniform"
    pooling: str = "mean"
    num_keys: int = 1
    exact: int = 0

    @property
    def relevance(self) -> Gate:
        """The gate itself where ``gate`` is its name."""
        return GATES[self.gate] if isinstance(self.gate, str) else self.gate

    @property
    def mixes(self) -> bool:
        """Whether parameters are mixed rather than reads."""
        return False

    @property
    def needs_connector(self) -> bool:
        """Whether gates are made from a connector."""
        return self.relevance.connector is not None

    @property
    def sums_all(self) -> bool:
        """Whether it is a gated sum over all states, in any order: Residual, GRM and Soup."""
        return type(self) in (Residual, GRM, Soup)

    def merges_exactly(self, memory: Memory) -> bool:
        """Whether the mean of n states, counted n times, gives the same output as the n states."""
        linear = self.mixes or memory.depth == 1
        return self.sums_all and linear and self.relevance == GATES["uniform"] and not self.exact

    @abc.abstractmethod
    def gates(
        self, cached: Float[Array, "... r"], live: Float[Array, "..."]
    ) -> tuple[Float[Array, "... r"], Float[Array, "..."]]:
        """The gates of the cached states and of the live memory.

        Args:
          cached: relevance of each cached state, -inf where it is not visible.
          live: relevance of the live memory.
        """

    def gates_with_tokens(
        self,
        cached: Float[Array, "... s"],
        live: Float[Array, "..."],
        tokens: Float[Array, "... s r"],
    ) -> tuple[Float[Array, "... s"], Float[Array, "..."], Float[Array, "... s r"]]:
        """``gates``, and those of the tokens kept beside the cached states: each is one more state.

        Args:
          cached: as for ``gates``.
          live: as for ``gates``.
          tokens: relevance of the tokens kept beside each cached state.
        """
        return joint_gates(self.gates, cached, live, tokens)

    def select(
        self,
        connector: Float[Array, "b h n c u"],
        candidates: Candidates,
        *,
        implementation: str | None = None,
    ) -> Selection:
        """The states that tokens read, and their gates; the reference makes them by ``gates``.

        Args:
          connector: what gates are made from.
          candidates: the states that the tokens of each block may read.
          implementation: of the selection.
        """
        del implementation
        scored = self._scores(connector, candidates)
        gates, live, beside = self._gates_of(connector, candidates, *scored)
        unread = candidates.same_document is not None
        return OfBlocks(candidates.states, gates, live, unread, beside)

    def _gates_of(
        self,
        connector: Float[Array, "b h n c u"],
        candidates: Candidates,
        cached: Float[Array, "b h n c r"],
        live: Float[Array, "b h n c"],
    ) -> tuple[Float[Array, "b h n c r"], Float[Array, "b h n c"], Beside | None]:
        """The gates of slots and live memory, from ``_scores``, and what kept tokens add."""
        if candidates.exact is None:
            return *self.gates(cached, live), None
        of_tokens = scores_of_tokens(connector, candidates, self.relevance, self.pooling)
        gates, live, of_tokens = self.gates_with_tokens(cached, live, of_tokens)
        read = read_of_tokens(candidates, of_tokens)
        return gates, live, Beside(of_tokens.sum(axis=-1), read)

    def _scores(self, connector: Array, candidates: Candidates) -> tuple[Array, Array]:
        return scores(connector, candidates, self.relevance, self.pooling, self.num_keys)

    def needs(self, memory: Memory) -> tuple[LivePart, ...]:
        """The parts of the live memory that ``read`` takes."""
        return ("later_layers",) if self._mixes_layers(memory) else ("reads",)

    def _mixes_layers(self, memory: Memory) -> bool:
        """Whether mixing parameters differs from mixing reads: not for a single layer."""
        return self.mixes and memory.depth > 1

    def read(
        self, bank: Bank, live: Live, query: Float[Array, "b h n c k"], selection: Selection
    ) -> Float[Array, "b h n c v"]:
        """The outputs of all tokens, which the reference makes by ``read_token``.

        A state that a token does not read affects neither its output nor a gradient, even if it is
        NaN. What exact tokens contribute, ``selection.beside``, is added afterwards.

        Args:
          bank: the cached states.
          live: the live memory at each token, with the parts that ``needs`` names.
          query: the queries, block by block.
          selection: as from ``select``.
        """
        if not self._mixes_layers(bank.memory):
            return _gated(selection.live, live.reads()) + bank.read(query, selection)

        def mixed(layer: int, x: Array) -> Array:
            """A layer of M*, never forming its weights: the gated sum of the layers' outputs."""
            own = live.first_layer() if layer == 0 else live.apply(layer, x)
            return _gated(selection.live, own) + bank.read_layer(layer, x, selection)

        return bank.memory.forward(mixed, query)

    def read_token(
        self, memory: Memory, states: Matrices, query: Float[Array, "k"], gates: Float[Array, "s"]
    ) -> Float[Array, "v"]:
        """The equation itself: one token's output, from states stacked along their first axis.

        Those with a gate of zero are not read.
        """
        read = gates != 0
        states = jax.tree.map(lambda matrix: jnp.where(read[:, None, None], matrix, 0), states)
        if self.mixes:
            mixture = jax.tree.map(lambda matrix: jnp.tensordot(gates, matrix, axes=1), states)
            return memory.read(mixture, query[None])[0]
        reads = jax.vmap(memory.read, in_axes=(0, None))(states, query[None])[:, 0]
        return jnp.einsum("s,sv->v", gates, reads)


def joint_gates(
    gates: Callable[[Array, Array], tuple[Array, Array]],
    cached: Float[Array, "... s"],
    live: Float[Array, "..."],
    tokens: Float[Array, "... s r"],
) -> tuple[Float[Array, "... s"], Float[Array, "..."], Float[Array, "... s r"]]:
    """``Aggregation.gates_with_tokens`` from a function that makes gates of states alone."""
    flat = tokens.reshape(*cached.shape[:-1], -1)
    each, live = gates(jnp.concatenate([cached, flat], axis=-1), live)
    states = cached.shape[-1]
    return each[..., :states], live, each[..., states:].reshape(tokens.shape)


def _gated(gates: Float[Array, "b h n c"], rows: Float[Array, "b h n c v"]) -> Array:
    return jnp.einsum("bhnc,bhncv->bhncv", gates, rows)


@dataclasses.dataclass(frozen=True)
class Residual(Aggregation):
    """The plain sum of all reads (Eq. 7 of arXiv:2602.24281); it needs no connector.

    Example:
      >>> import memcache_jax as mc
      >>> mc.Residual().needs_connector
      False
    """

    def gates(self, cached: Array, live: Array) -> tuple[Array, Array]:
        """One for every visible state: the exponential of a relevance that is 0 everywhere."""
        return jnp.exp(cached), jnp.exp(live)


@dataclasses.dataclass(frozen=True)
class GRM(Aggregation):
    """Gated residual memory (Eq. 9-10 of arXiv:2602.24281): gates by relevance to the token.

    gamma_t = softmax over the cached states and the live one of <u_t, p_i>, their pooled keys.

    Attributes:
      gate: ``"content"``, the gate above; ``"position"``, softmax of learned logits of a state's
        distance; ``"uniform"``, one over the number of visible states.
      pooling: ``"mean"`` or ``"sum"`` of a bucket's keys. The paper writes MeanPooling and prints a
        sum (Eq. 17), which grows with the segment and saturates the softmax.
      num_keys: P pooled keys per state, one for each of P equal spans of its tokens. A state's
        relevance is that of its best-matching key, max_j <u_t, p_ij>, so that gates find facts that
        a single mean key would hide. The live memory has the spans begun so far. P must divide the
        size of ``Constant`` or ``Logarithmic`` segments, or the greatest common divisor of
        ``Lengths``. Segments of ``Adaptive`` have spans of ``max / P`` tokens, a whole number of
        blocks, the last one perhaps shorter: so a shorter segment has fewer keys. The paper has
        P = 1. Each cached state takes k (P - 1) more numbers. For P > 1 states are selected by XLA,
        not by a kernel.
      exact: r, the tokens kept beside each cached state: those of its segment and document for
        which the error of the cached state, |v - M(k)|^2, is largest. Each token is read as one
        more state, with its key as the pooled key and its value as the read::

            y_t = gamma_live M_t(q_t) + sum_i (gamma_i M_i(q_t) + sum_j gamma_ij v_ij)

        with one softmax over all relevances; a token's is <u_t, k_ij> - log C. As a state of n
        merged segments counts n times, a token counts 1 / C times, where C is the most tokens in a
        segment. The state at the segment's end shows what reads will miss; errors at the time of
        writing would choose a segment's first tokens, which meet an empty memory. The paper keeps
        no tokens.

        Gradients reach keys and values, but not the choice. Segments must be ``Constant``,
        ``Lengths`` or ``Adaptive``, of at least ``exact`` tokens. XLA chooses and reads the tokens
        under every ``implementation``, and then also runs SSC's router. A stream also holds the
        tokens of the live segment, to choose from.

    Raises:
      ValueError: for an unknown gate or pooling, for ``num_keys`` below 1, or above 1 with a gate
        that compares no keys, or for ``exact`` below 0.

    Example:
      >>> import memcache_jax as mc
      >>> mc.GRM(exact=4)
      GRM(gate='content', pooling='mean', num_keys=1, exact=4)
    """

    gate: str | Gate = "content"
    pooling: str = "mean"
    num_keys: int = dataclasses.field(default=1, kw_only=True)
    exact: int = dataclasses.field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        known = isinstance(self.gate, str) and self.gate in GATES
        if not known and not isinstance(self.gate, Gate):
            raise ValueError(
                f"gate must be one of {list(GATES)} or an instance of mc.Gate, got "
                f"{shown(self.gate)}"
            )
        check_choice("pooling", self.pooling, ("mean", "sum"))
        set_fields(self, num_keys=check_integer("num_keys", self.num_keys))
        if self.num_keys > 1 and not self.relevance.reads_keys:
            raise ValueError(
                f"num_keys={self.num_keys} needs a gate that compares keys, got {shown(self.gate)}"
            )
        set_fields(self, exact=check_integer("exact", self.exact, 0))

    def gates(self, cached: Array, live: Array) -> tuple[Array, Array]:
        """Softmax of the relevance."""
        return softmax_gates(cached, live)


@dataclasses.dataclass(frozen=True)
class Soup(GRM):
    """Memory soup (Eq. 14-15 of arXiv:2602.24281): one read of a mixture of the memories.

    Every matrix of M* is the sum of the visible states' matrices, weighed by GRM's gates. For
    memories of one layer that is GRM; for deeper ones it is not. The mixture is never formed. Its
    attributes are GRM's.

    Example:
      >>> import memcache_jax as mc
      >>> mc.Soup()
      Soup(gate='content', pooling='mean', num_keys=1, exact=0)
    """

    @property
    def mixes(self) -> bool:
        """True."""
        return True
