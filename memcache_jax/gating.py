"""Which cached states tokens may read, and their relevance: connectors against pooled keys."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Bool, Float, Int
from memcache_jax.kernels.gate_softmax import softmax_gates
from memcache_jax.kernels.running_sum import running_sum
from memcache_jax.segmentation import ReadPlan

__all__ = [
    "Candidates",
    "Keys",
    "OfBlocks",
    "OfTokens",
    "Selection",
    "finite_rows",
    "gates_by_state",
    "in_order",
    "pooled_keys",
    "running_keys",
    "scores",
    "softmax_gates",
]


class Keys(NamedTuple):
    """The pooled keys that content gates compare with connectors.

    Attributes:
      live: of the live memory at each token.
      states: of cached states, by their numbers in the bank; None where they depend on the block,
      slots: and stand by slot.
    """

    live: Float[Array, "b h n c k"]
    states: Float[Array, "b h states k"] | None = None
    slots: Float[Array, "b h n r k"] | None = None


class Candidates(NamedTuple):
    """The cached states that the tokens of each block may read, and what gates are made from.

    Attributes:
      states: numbers of states in the bank, oldest first, -1 for an empty slot. One row stands for
        all, and a NumPy array is static: slots that are empty in it cost nothing.
      distances: segments back to each state's end, 1 for the last segment.
      keys: makes the pooled keys, of ``"mean"`` or ``"sum"`` pooling.
      same_document: whether a token and a state are of one document; None for yes.
      counts: segments that a state stands for, 0 for an empty slot; None for one each.
    """

    states: np.ndarray | Int[Array, "b n r"]
    distances: np.ndarray | Int[Array, "b n r"]
    keys: Callable[[str], Keys]
    same_document: Bool[Array, "b n c r"] | None = None
    counts: Int[Array, "b n r"] | None = None


class OfBlocks(NamedTuple):
    """A selection in which all tokens of a block read the same states.

    Attributes:
      states: as of ``Candidates``.
      gates: of the cached states.
      live: of the live memory.
      unread: whether a gate of zero says that the token does not read the state, whatever it holds.
    """

    states: np.ndarray | Int[Array, "b n r"]
    gates: Float[Array, "b h n c r"]
    live: Float[Array, "b h n c"]
    unread: bool = False


class OfTokens(NamedTuple):
    """A selection in which each token has its own states.

    Attributes:
      states: numbers of states in the bank, -1 for none.
      gates: of the cached states.
      live: of the live memory.
    """

    states: Int[Array, "b h n c s"]
    gates: Float[Array, "b h n c s"]
    live: Float[Array, "b h n c"]


Selection: TypeAlias = OfBlocks | OfTokens


def gates_by_state(selection: Selection, count: int) -> Float[Array, "b h n c states"]:
    """The gates of all ``count`` states of the bank, zero for those that a token does not read."""
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
    key: Float[Array, "n c k"],
    plan: ReadPlan,
    pooling: str = "mean",
    document: Int[Array, "n c"] | None = None,
) -> Float[Array, "n c k"]:
    """Returns, for each token, the mean or sum of its segment's keys up to and with its own.

    With documents, of those of its own document.
    """
    if document is not None:
        return _running_document_keys(key, plan, pooling, document)
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


def _running_document_keys(
    key: Float[Array, "n c k"], plan: ReadPlan, pooling: str, document: Int[Array, "n c"]
) -> Float[Array, "n c k"]:
    """``running_keys`` where sums also begin anew with each document."""
    n, c, k = key.shape
    flat = document.reshape(-1)
    begins = flat != jnp.pad(flat[:-1], (1, 0))
    begins = begins.reshape(n, c).at[:, 0].max(plan.begins).reshape(-1)

    def combine(left: tuple, right: tuple) -> tuple:
        begins, sums, counts = right
        before = (jnp.where(begins.reshape(-1, *[1] * (x.ndim - 1)), 0, x) for x in left[1:])
        return left[0] | begins, *(x + y for x, y in zip(before, (sums, counts), strict=True))

    ones = jnp.ones(n * c, key.dtype)
    _, sums, counts = jax.lax.associative_scan(combine, (begins, key.reshape(-1, k), ones))
    sums = sums / counts[:, None] if pooling == "mean" else sums
    return sums.reshape(n, c, k)


def scores(
    connector: Float[Array, "b h n c u"], candidates: Candidates, gate: str, pooling: str = "mean"
) -> tuple[Float[Array, "b h n c r"], Float[Array, "b h n c"]]:
    """Returns the relevance of the states that each token may read, and of the live memory.

    Content gates have r_t^(i) = <u_t, p_i> (Eq. 10 of arXiv:2602.24281); position gates the logit
    of the state's distance, or of the farthest that has one; uniform gates zero. A state that
    stands for n segments counts n times. Empty slots and states of other documents score -inf.

    Args:
      connector: what gates are made from.
      candidates: the states.
      gate: ``"content"``, ``"position"`` or ``"uniform"``.
      pooling: of the keys, for content gates.
    """
    slots, distances = (jnp.asarray(x)[:, None, :, None] for x in candidates[:2])  # (b, 1, n, 1, r)
    visible = slots >= 0
    if gate == "content":
        keys = candidates.keys(pooling)
        cached = _products(connector, keys, candidates.states)
        live = jnp.vecdot(connector, keys.live, precision="highest")
    elif gate == "position":
        distances = jnp.clip(distances, 0, connector.shape[-1] - 1)
        cached = jnp.take_along_axis(connector, distances, axis=-1)
        live = connector[..., 0]
    else:
        live = jnp.zeros(connector.shape[:4], connector.dtype)
        cached = jnp.zeros((*live.shape, slots.shape[-1]), connector.dtype)
    if candidates.counts is not None:
        counts = candidates.counts[:, None, :, None]
        cached += jnp.log(jnp.maximum(counts, 1).astype(cached.dtype))
        visible &= counts > 0
    if candidates.same_document is not None:
        visible &= candidates.same_document[:, None]
    return jnp.where(visible, cached, -jnp.inf), live


def _products(
    connector: Float[Array, "b h n c u"], keys: Keys, states: np.ndarray | Int[Array, "b n r"]
) -> Float[Array, "b h n c r"]:
    """The products of connectors and pooled keys by slot, NaN where a key is not finite."""
    # 0 * NaN is NaN: in a gradient, the keys of states that are not read.
    if keys.slots is not None:
        pooled, broken = finite_rows(keys.slots)
        cached = jnp.einsum("bhnck,bhnrk->bhncr", connector, pooled, precision="highest")
        return jnp.where(broken[..., None, :], jnp.nan, cached)
    assert keys.states is not None
    pooled, broken = finite_rows(keys.states)
    cached = jnp.einsum("bhnck,bhrk->bhncr", connector, pooled, precision="highest")
    cached = jnp.where(broken[:, :, None, None], jnp.nan, cached)
    if in_order(states, pooled.shape[2]):
        return cached
    slots = jnp.maximum(jnp.asarray(states), 0)
    return jnp.take_along_axis(cached, slots[:, None, :, None], axis=-1)


def in_order(states: np.ndarray | Array, count: int) -> bool:
    """Whether there are ``count`` slots, and it is known that slot i is empty or has state i."""
    if not isinstance(states, np.ndarray) or states.shape[-1] != count:
        return False
    return not np.any((states >= 0) & (states != np.arange(count)))


def finite_rows(rows: Float[Array, "*r k"]) -> tuple[Float[Array, "*r k"], Bool[Array, "*r"]]:
    """The rows, zero where not all of one is finite, and where that is."""
    finite = jnp.isfinite(rows).all(axis=-1)
    return jnp.where(finite[..., None], rows, 0), ~finite
