"""What travels through the engine, by name; axes as in the legend of ``_typing``."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Bool, Controls, Float, Int, State
from memcache_jax.memories import Memory


class Tokens(NamedTuple):
    """The tokens of a sequence with all their controls; cut into blocks, (b, h, n, c, ...)."""

    query: Float[Array, "b h t k"]
    key: Float[Array, "b h t k"]
    value: Float[Array, "b h t v"]
    connector: Float[Array, "b h t u"]
    controls: Controls
    border: Any = None  # (b, h, t), of ``Adaptive(by="scores")``; else None


class Rows(NamedTuple):
    """The tokens of chunks (b, h, n, chunks, m, ...): what is written, and reads the live memory.

    Attributes:
      begun: number of documents that have begun in the chunk up to and with each token; a float, so
        that it has a cotangent. None without packed documents.
      bad: the tokens with a number that was not finite and is zero now, see ``finite``; None if
        there are none.
      came: the same rows before that, in their own dtype, for kernels that clean them; else None.
    """

    query: Float[Array, "b h n chunks m k"]
    key: Float[Array, "b h n chunks m k"]
    value: Float[Array, "b h n chunks m v"]
    controls: Controls
    begun: Float[Array, "b h n chunks m"] | None = None
    bad: Bool[Array, "b h n chunks m"] | None = None
    came: Any = None


class Blocks(NamedTuple):
    """Tokens cut into a plan's blocks, padded with zeros that no real token sees.

    Attributes:
      tokens: (b, h, n, c, ...).
      document: the number of each token's document; None without packed documents.
      rows: the same tokens chunk by chunk.
      pooled: the keys to pool for cached states, as they came: the gate of a state is unknown if
        one of its keys is not finite.
      came: the tokens as they came, in their own dtype, for kernels; else None.
    """

    tokens: Tokens
    document: Int[Array, "b n c"] | None
    rows: Rows
    pooled: Float[Array, "b h n c k"]
    came: Any = None


class Carry(NamedTuple):
    """What one chunk hands to the next.

    Attributes:
      state: the memory's.
      initial: the state that documents begin with, of a memory with learned weights; else None.
      transition: of the run so far, where ``Writing.maps``; else None.
    """

    state: State
    initial: State
    transition: Any = None


class Writing(NamedTuple):
    """How memories are written.

    Attributes:
      memory: the rule.
      needs: the parts of the live memory to keep, as ``Aggregation.needs`` names them.
      initial: makes the states before a run's first token, of a shape (b, h, ...).
      implementation: of the writing operations.
      maps: whether runs are wanted as maps, with their transitions, to compose them.
      exact: tokens to keep beside each cached state, as ``Aggregation.exact``.
    """

    memory: Memory
    needs: tuple[str, ...]
    initial: Callable[[tuple[int, ...]], State]
    implementation: str | None
    maps: bool = False
    exact: int = 0

    def with_no_reads(self) -> "Writing":
        """The same, keeping nothing of the live memory."""
        return self._replace(needs=())

    def with_maps(self, wanted: bool = True) -> "Writing":
        """The same with runs as maps, if wanted and if the memory's are."""
        return self._replace(maps=wanted and self.memory.merges)


Views = dict[str, Any]
"""What reads need of the live memory, by name, arrays (b, h, n, chunks, ...); see ``read.keep``."""


class Keys(NamedTuple):
    """The pooled keys that content gates compare with connectors.

    Attributes:
      live: of the live memory at each token.
      states: of cached states, by their numbers in the bank.
      slots: of cached states by slot, in place of ``states``, where they depend on the block.
      products: computes the products of connectors with ``live``, for programs that need nothing
        else of ``live``; None to multiply by ``live``.
      at_once: computes the products of connectors with ``states`` and ``live``, or returns None for
        connectors that are not those of the call; None where each is multiplied by itself.
    """

    live: Float[Array, "b h n c k"]
    states: Float[Array, "b h states k"] | None = None
    slots: Float[Array, "b h n r k"] | None = None
    products: Callable[[Array], Array] | None = None
    at_once: Callable[[Array], tuple[Array, Array] | None] | None = None

    def live_scores(self, connector: Float[Array, "b h n c k"]) -> Float[Array, "b h n c"]:
        """The products of connectors with the keys of the live memory."""
        if self.products is not None:
            return self.products(connector)
        return jnp.vecdot(connector, self.live, precision="highest")

    def by_slot(self, states: Int[Array, "_ 1 n r"]) -> tuple[Array, Array]:
        """The keys of the live memory, and those of the states in each slot, zero in empty ones."""
        if self.slots is not None:
            return self.live, jnp.where(states[..., None] >= 0, self.slots, 0)
        assert self.states is not None
        shape = (*self.live.shape[:3], states.shape[-1])
        flat = jnp.broadcast_to(states, shape).reshape(*shape[:2], -1)
        slots = jnp.take_along_axis(self.states, jnp.maximum(flat, 0)[..., None], axis=2)
        return self.live, jnp.where(flat[..., None] >= 0, slots, 0).reshape(*shape, -1)


class Exact(NamedTuple):
    """Tokens kept beside cached states, by the states' numbers in the bank.

    Attributes:
      key: their keys, NaN where it is unknown which tokens to keep.
      value: their values, finite.
      longest: the most tokens in a segment; a token counts 1 / longest as much as a state.
      counts: how many of its tokens each state has, from the first on; None if all states have all.
      table: the ``Candidates.states`` whose slot i is known to hold state i or none, though they
        are not static; None if there are none.
      take: a function of states (b, h, m) that returns their keys and values without reading
        others; None where they are taken from the arrays.
    """

    key: Float[Array, "b h states r k"]
    value: Float[Array, "b h states r v"]
    longest: int
    counts: Int[Array, "_ states"] | None = None
    table: Any = None
    take: Callable[[Array], tuple[Array, Array]] | None = None


class SpanKeys(NamedTuple):
    """Several pooled keys per state, one for each equal span of its tokens.

    Attributes:
      live: of the span that each token lies in, up to and including the token.
      ended: of the spans of each block, which is a segment.
      seen: whether a span of a token's segment ended before the token's own, in its document.
      states: as of ``Keys``.
      slots: as of ``Keys``.
    """

    live: Float[Array, "b h n c k"]
    ended: Float[Array, "b h n spans k"]
    seen: np.ndarray | Bool[Array, "_ _n c spans"]
    states: Float[Array, "b h states spans k"] | None = None
    slots: Float[Array, "b h n r spans k"] | None = None


class Candidates(NamedTuple):
    """The cached states that the tokens of each block may read, and what gates are made from.

    Attributes:
      states: numbers of states in the bank, oldest first, -1 for an empty slot. One row stands for
        all, and a NumPy array is static: slots that are empty in it cost nothing.
      distances: segments back to each state's end, 1 for the last segment.
      keys: makes the pooled keys, of ``"mean"`` or ``"sum"`` pooling.
      same_document: whether a token and a state are of one document; None for yes.
      counts: segments that a state stands for, 0 for an empty slot; None for one each. A stream
        knows its empty slots by counts alone: ask ``gating.visible``.
      held: which numbers have a state, so that keys of others are ignored; None if unknown.
      spans: makes several pooled keys per state, given the pooling and their number; None where
        states have one each.
      exact: the tokens kept beside the states; None if there are none.
      nodes: a function of places (b, h, m) that returns the keys (b, h, m, k) which a stream keeps
        for a router with a ``Tree``; None where they are computed from ``keys``.
      log_counts: the logarithm of how often the state in each slot counts; None if once each.
    """

    states: np.ndarray | Int[Array, "_ n r"]
    distances: np.ndarray | Int[Array, "_ n r"]
    keys: Callable[[str], Keys]
    same_document: Bool[Array, "b n c r"] | None = None
    counts: Int[Array, "b n r"] | None = None
    held: Bool[Array, "b states"] | None = None
    spans: Callable[[str, int], SpanKeys] | None = None
    exact: Exact | None = None
    nodes: Callable[[Array], Array] | None = None
    log_counts: Float[Array, "b r"] | None = None


class CachedStates(NamedTuple):
    """The cached states of one layer, for others to read.

    Attributes:
      matrices: those of all states, as in ``read.ArrayBank``.
      pooled: their pooled keys.
      chosen: what each token chose, ``choice_of``; None of aggregations other than ``SSC``.
    """

    matrices: Any
    pooled: Float[Array, "b h states k"]
    chosen: Float[Array, "b t h u"] | None = None


class Beside(NamedTuple):
    """What tokens kept exactly add to the outputs of a selection.

    Attributes:
      gates: the sum of the gates of each selected state's tokens, as the selection's own gates.
      read: the gated sum of their values.
    """

    gates: Float[Array, "b h n c r"]
    read: Float[Array, "b h n c v"]


class OfBlocks(NamedTuple):
    """A selection in which all tokens of a block read the same states.

    Attributes:
      states: as of ``Candidates``.
      gates: of the cached states.
      live: of the live memory.
      unread: if true, a token with a gate of 0 skips the state, even if that contains NaN.
      beside: what kept tokens add; None for nothing.
    """

    states: np.ndarray | Int[Array, "_ n r"]
    gates: Float[Array, "b h n c r"]
    live: Float[Array, "b h n c"]
    unread: bool = False
    beside: Beside | None = None


class OfTokens(NamedTuple):
    """A selection in which each token has its own states.

    Attributes:
      states: numbers of states in the bank, -1 for none.
      gates: of the cached states.
      live: of the live memory.
      beside: what kept tokens add; None for nothing.
    """

    states: Int[Array, "b h n c s"]
    gates: Float[Array, "b h n c s"]
    live: Float[Array, "b h n c"]
    beside: Beside | None = None


Selection: TypeAlias = OfBlocks | OfTokens

LivePart: TypeAlias = Literal["reads", "later_layers", "layers"]
"""A part of the live memory: what each token reads with its query; the first layer's output for the
query and all later layers, to apply to anything; or all layers."""
