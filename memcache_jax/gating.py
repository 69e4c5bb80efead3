"""Which cached states tokens may read, and their relevance: connectors against pooled keys."""

import abc
import dataclasses
import functools
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Bool, Float, Int
from memcache_jax.engine.types import Candidates, Keys, OfTokens, Selection
from memcache_jax.kernels.running_sum import running_products, running_sum
from memcache_jax.segmentation import ReadPlan


def gates_by_state(selection: Selection, count: int) -> Float[Array, "b h n c states"]:
    """The gates of all ``count`` states of the bank, zero for those that a token does not read.

    A state's gate includes those of the tokens kept beside it.
    """
    if selection.beside is not None:
        gates = selection.gates + selection.beside.gates
        selection = selection._replace(gates=gates, beside=None)
    if isinstance(selection, OfTokens):
        states = selection.states
    elif in_order(selection.states, count):
        return selection.gates
    else:
        states = jnp.asarray(selection.states)[:, None, :, None]

    def spread(gates: Float[Array, "s"], states: Int[Array, "s"]) -> Float[Array, "states"]:
        return jnp.zeros(count, gates.dtype).at[states].add(gates, mode="drop")

    gates = selection.gates
    states = jnp.broadcast_to(jnp.where(states < 0, count, states), gates.shape)
    flat = (x.reshape(-1, x.shape[-1]) for x in (gates, states))
    return jax.vmap(spread)(*flat).reshape(*gates.shape[:-1], count)


def pooled_keys(
    key: Float[Array, "n c k"],
    plan: ReadPlan,
    pooling: str = "mean",
    document: Int[Array, "n c"] | None = None,
) -> Float[Array, "buckets k"]:
    """Returns the mean or the sum of each bucket's keys (Eq. 8 of arXiv:2602.24281).

    With documents, of the keys of the last token's document.
    """
    first, after = plan.buckets[:, 0], plan.buckets[:, 1]
    owner = np.repeat(np.arange(len(first)), after - first)
    block = np.concatenate([np.arange(f, a) for f, a in plan.buckets] or [first])

    def over_buckets(blocks: Array) -> Array:
        return jax.ops.segment_sum(blocks, owner, num_segments=len(first), indices_are_sorted=True)

    if document is None:
        sums = over_buckets((key.mean(axis=1) if pooling == "mean" else key.sum(axis=1))[block])
        return sums / jnp.asarray(after - first, key.dtype)[:, None] if pooling == "mean" else sums
    last = document[after - 1, -1][owner]
    same = document[block] == last[:, None]
    sums = over_buckets(jnp.sum(key[block], axis=1, where=same[..., None]))
    counts = over_buckets(same.sum(axis=1).astype(key.dtype))
    return sums / counts[:, None] if pooling == "mean" else sums


def running_keys(
    key: Float[Array, "n c k"], plan: ReadPlan, pooling: str = "mean"
) -> Float[Array, "n c k"]:
    """Returns, for each token, the mean or sum of its segment's keys up to and with its own."""
    sums = running_sum(key)
    block = np.arange(plan.num_blocks)
    before = block - plan.first
    if np.any(before):
        same = (plan.first[:, None] <= block[None]) & (block[None] < block[:, None])
        blocks, broken = finite_rows(key.sum(axis=1))
        earlier = jnp.tensordot(same.astype(key.dtype), blocks, axes=1)
        spoilt = jnp.any(jnp.where(same, broken[None], False), axis=1)
        sums += jnp.where(spoilt[:, None], jnp.nan, earlier)[:, None]
    if pooling == "sum":
        return sums
    counts = before[:, None] * plan.block_size + np.arange(1, key.shape[1] + 1)[None]
    return sums / jnp.asarray(counts, key.dtype)[..., None]


def running_scores(
    plan: ReadPlan,
    key: Float[Array, "b h n c k"],
    pooling: str,
    connector: Float[Array, "b h n c k"],
) -> Float[Array, "b h n c"]:
    """The products of connectors with ``running_keys``; every block must begin a segment."""
    assert not np.any(np.arange(plan.num_blocks) != plan.first)
    products = jax.vmap(jax.vmap(running_products))(connector, key)
    if pooling == "sum":
        return products
    counts = jnp.arange(1, key.shape[3] + 1, dtype=key.dtype)
    return products / counts.reshape(1, 1, 1, -1)


class Gate(abc.ABC):
    """The relevance of states to a token, from which an aggregation makes their gates.

    A new gate is a frozen dataclass that implements ``score``; to give it a name, add it to
    ``GATES``.

    Attributes:
      connector: what ``memory_caching`` takes as the connector: ``"key"``, a vector to compare with
        keys (b, t, h, k); ``"distances"``, logits (b, t, h, distances); or None, nothing. A layer
        makes it from its input.
      reads_keys: whether ``score`` depends on pooled keys; if not, they are not made.
    """

    connector: ClassVar[Literal["key", "distances"] | None] = None
    reads_keys: ClassVar[bool] = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "score" in vars(cls) and "scores" not in vars(cls):  # products of another equation
            cls.scores = Gate.scores
        if cls.connector not in (None, "key", "distances"):
            raise TypeError(
                f"the connector of {cls.__name__} must be None, 'key' or 'distances', got "
                f"{cls.connector!r}"
            )

    @abc.abstractmethod
    def score(
        self, connector: Float[Array, "u"], key: Float[Array, "k"], distance: Int[Array, ""]
    ) -> Float[Array, ""]:
        """The relevance of one state to one token, which is the equation.

        Args:
          connector: the token's.
          key: the pooled key of the state, zero if the gate reads no keys.
          distance: segments back to the state's end; 0 for the live memory.
        """

    def scores(
        self, connector: Float[Array, "b h n c u"], candidates: Candidates, pooling: str
    ) -> tuple[Float[Array, "b h n c r"], Float[Array, "b h n c"]]:
        """``score`` of the states in all slots, and of the live memory; empty slots are ignored.

        Override it where all scores together are a product.
        """
        slots, distances = (
            jnp.asarray(x)[:, None] for x in (candidates.states, candidates.distances)
        )
        shape = (*connector.shape[:3], slots.shape[-1])
        live_keys, keys = jnp.zeros((*connector.shape[:4], 1)), jnp.zeros((*shape, 1))
        if self.reads_keys:
            live_keys, keys = candidates.keys(pooling).by_slot(slots)
        keys, broken = finite_rows(keys)  # as in _products
        of_states = jax.vmap(self.score, in_axes=(None, 0, 0))
        cached, live = of_states, self.score
        for in_axes in ((0, None, None), (0, 0, 0), (0, 0, 0), (0, 0, 0)):  # c, n, h, b
            cached = jax.vmap(cached, in_axes=in_axes)
        for _ in range(4):
            live = jax.vmap(live)
        here = jnp.zeros(connector.shape[:4], jnp.int32)
        distances = jnp.broadcast_to(distances, shape)
        cached = jnp.where(broken[..., None, :], jnp.nan, cached(connector, keys, distances))
        return cached, live(connector, live_keys, here)


@dataclasses.dataclass(frozen=True)
class ContentGate(Gate):
    """r_t^(i) = <u_t, p_i>, the connector against the state's pooled key (Eq. 10)."""

    connector = "key"

    def score(self, connector: Array, key: Array, distance: Array) -> Array:
        """<u, p>."""
        del distance
        return jnp.vdot(connector, key)

    def scores(
        self, connector: Float[Array, "b h n c u"], candidates: Candidates, pooling: str
    ) -> tuple[Float[Array, "b h n c r"], Float[Array, "b h n c"]]:
        """Products of all connectors with all keys, NaN where a key is not finite."""
        keys = candidates.keys(pooling)
        at_once = None if keys.at_once is None else keys.at_once(connector)
        if at_once is not None:
            return at_once
        return _products(connector, keys, candidates), keys.live_scores(connector)


@dataclasses.dataclass(frozen=True)
class PositionGate(Gate):
    """The logit of the state's distance, or of the farthest that has one; blind to content."""

    connector = "distances"
    reads_keys: ClassVar[bool] = False

    def score(self, connector: Array, key: Array, distance: Array) -> Array:
        """The logit."""
        del key
        return connector[jnp.clip(distance, 0, connector.shape[-1] - 1)]

    def scores(
        self, connector: Float[Array, "b h n c u"], candidates: Candidates, pooling: str
    ) -> tuple[Float[Array, "b h n c r"], Float[Array, "b h n c"]]:
        """Logits taken by distance, those of a block's tokens at once."""
        del pooling
        distances = jnp.asarray(candidates.distances)[:, None, :, None]
        distances = jnp.clip(distances, 0, connector.shape[-1] - 1)
        return jnp.take_along_axis(connector, distances, axis=-1), connector[..., 0]


@dataclasses.dataclass(frozen=True)
class UniformGate(Gate):
    """All states are equally relevant."""

    reads_keys: ClassVar[bool] = False

    def score(self, connector: Array, key: Array, distance: Array) -> Array:
        """Zero."""
        del key, distance
        return jnp.zeros((), connector.dtype)


GATES: dict[str, Gate] = {
    "content": ContentGate(),
    "position": PositionGate(),
    "uniform": UniformGate(),
}
"""Gates by name, as in ``GRM(gate="content")``."""


def scores(
    connector: Float[Array, "b h n c u"],
    candidates: Candidates,
    gate: Gate,
    pooling: str = "mean",
    num_keys: int = 1,
) -> tuple[Float[Array, "b h n c r"], Float[Array, "b h n c"]]:
    """Returns the relevance of the states that each token may read, and of the live memory.

    A state that stands for n segments counts n times. Empty slots and states of other documents
    score -inf. Of a state's ``num_keys`` keys, the one with the highest score counts.
    """
    if num_keys > 1 and candidates.states.shape[-1]:
        cached, live = _scores_of_spans(connector, candidates, gate, pooling, num_keys)
    else:
        cached, live = gate.scores(connector, candidates, pooling)
    if candidates.counts is not None:
        counts = candidates.counts[:, None, :, None]
        cached += jnp.log(jnp.maximum(counts, 1).astype(cached.dtype))
    if candidates.log_counts is not None:
        cached += candidates.log_counts[:, None, None, None]
    return jnp.where(visible(candidates)[:, None], cached, -jnp.inf), live


def _scores_of_spans(
    connector: Float[Array, "b h n c u"],
    candidates: Candidates,
    gate: Gate,
    pooling: str,
    num_keys: int,
) -> tuple[Float[Array, "b h n c r"], Float[Array, "b h n c"]]:
    """The highest score of each state's keys, and of the live memory's spans so far.

    To the gate each key is a state of its own.
    """
    if candidates.spans is None:
        raise ValueError(
            f"these states have one pooled key each, got num_keys={num_keys}: so have those of "
            "several segments of packed documents on a mesh that divides time, and candidates "
            "without spans"
        )
    keys, states = candidates.spans(pooling, num_keys), candidates.states
    xp, span = (np if isinstance(states, np.ndarray) else jnp), np.arange(num_keys)[None, None]
    numbers = xp.where(states[..., None] >= 0, states[..., None] * num_keys + span[:, :, None], -1)
    held = candidates.held

    def flat(x: Array | None) -> Array | None:
        return None if x is None else x.reshape(*x.shape[:-3], -1, x.shape[-1])

    each = Candidates(
        numbers.reshape(*states.shape[:-1], -1),
        (np if isinstance(candidates.distances, np.ndarray) else jnp).repeat(
            candidates.distances, num_keys, axis=-1
        ),
        lambda _: Keys(keys.live, flat(keys.states), flat(keys.slots)),
        held=None if held is None else jnp.repeat(held, num_keys, axis=-1),
    )
    cached, live = gate.scores(connector, each, pooling)
    here = np.zeros((1, connector.shape[2], num_keys), int)
    own = Candidates(here + span, here, lambda _: Keys(keys.live, slots=keys.ended))
    ended = jnp.where(keys.seen[:, None], gate.scores(connector, own, pooling)[0], -jnp.inf)
    spans = [live, *jnp.moveaxis(ended, -1, 0)]
    cached = jnp.moveaxis(cached.reshape(*cached.shape[:-1], -1, num_keys), -1, 0)
    return functools.reduce(_higher, cached), functools.reduce(_higher, spans)


def _higher(one: Array, other: Array) -> Array:
    """The larger of two scores, NaN if one is; the gradient is that score's alone."""
    return jnp.where((other > one) | jnp.isnan(other), other, one)


def visible(candidates: Candidates) -> Bool[Array, "_ n _ r"]:
    """Whether each slot holds a state that a token may read; a size of 1 stands for all."""
    seen = jnp.asarray(candidates.states)[:, :, None] >= 0
    if candidates.counts is not None:
        seen &= candidates.counts[:, :, None] > 0
    return seen if candidates.same_document is None else seen & candidates.same_document


def _products(
    connector: Float[Array, "b h n c u"], keys: Keys, candidates: Candidates
) -> Float[Array, "b h n c r"]:
    """The products of connectors and pooled keys by slot, NaN where a key is not finite."""
    # 0 * NaN is NaN: keys of unread states that are not finite would spoil gradients.
    if keys.slots is not None:
        pooled, broken = finite_rows(keys.slots)
        cached = jnp.einsum("bhnck,bhnrk->bhncr", connector, pooled, precision="highest")
        return jnp.where(broken[..., None, :], jnp.nan, cached)
    assert keys.states is not None
    pooled, broken = keys.states, None
    if candidates.held is None:
        pooled, broken = finite_rows(pooled)
    else:
        pooled = jnp.where(candidates.held[:, None, :, None], pooled, 0)
    # All tokens as one axis: with two, XLA's CPU backend transposes the keys of a stream.
    rows = connector.reshape(*connector.shape[:2], -1, connector.shape[-1])
    cached = jnp.einsum("bhtk,bhrk->bhtr", rows, pooled, precision="highest")
    cached = cached.reshape(*connector.shape[:4], -1)
    if broken is not None:
        cached = jnp.where(broken[:, :, None, None], jnp.nan, cached)
    if in_order(candidates.states, pooled.shape[2]):
        return cached
    slots = jnp.maximum(jnp.asarray(candidates.states), 0)
    return jnp.take_along_axis(cached, slots[:, None, :, None], axis=-1)


def in_order(states: np.ndarray | Array, count: int) -> bool:
    """Whether all ``count`` states have a slot, and slot i is known to hold state i or none."""
    if not isinstance(states, np.ndarray) or states.shape[-1] != count:
        return False
    return not np.any((states >= 0) & (states != np.arange(count)))


def finite_rows(rows: Float[Array, "*r k"]) -> tuple[Float[Array, "*r k"], Bool[Array, "*r"]]:
    """Returns the rows with zeros for each that is not finite, and a mask of those."""
    finite = jnp.isfinite(rows).all(axis=-1)
    return jnp.where(finite[..., None], rows, 0), ~finite
