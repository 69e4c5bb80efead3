"""Tokens kept exactly beside cached states: which ones, and what they add to later outputs."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memcache_jax._typing import Array, Bool, Float, Int, Matrices
from memcache_jax.adaptive import Adaptive
from memcache_jax.engine.types import Blocks, Candidates, Exact, Keys
from memcache_jax.gating import Gate, finite_rows, in_order, scores
from memcache_jax.kernels._largest import largest
from memcache_jax.kernels.grouped_read import grouped_read
from memcache_jax.memories import Memory
from memcache_jax.segmentation import Constant, Lengths, Segmentation


def longest_segment(segmentation: Segmentation) -> int:
    """The most tokens that a segment can have."""
    lengths = segment_lengths(segmentation)
    assert lengths is not None  # from check_keeps
    return lengths[1]


def segment_lengths(segmentation: Segmentation) -> tuple[int, int] | None:
    """Fewest and most tokens in a segment; None for a segmentation that cannot keep tokens."""
    if isinstance(segmentation, Adaptive):
        return segmentation.min, segmentation.max
    if isinstance(segmentation, Lengths):
        return min(segmentation.lengths), max(segmentation.lengths)
    if isinstance(segmentation, Constant):
        return segmentation.size, segmentation.size
    return None


def check_keeps(exact: int, segmentation: Segmentation) -> None:
    """Raises ValueError unless ``exact`` tokens of each segment can be kept."""
    lengths = segment_lengths(segmentation)
    if lengths is None or exact > lengths[0]:
        raise ValueError(
            f"exact={exact} tokens beside each state need Constant, Lengths or Adaptive segments "
            f"of as many tokens or more, got {segmentation}"
        )


def worst_recalled(
    memory: Memory,
    matrices: Matrices,
    key: Float[Array, "b h s t k"],
    value: Float[Array, "b h s t v"],
    there: Bool[Array, "_ s t"] | None,
    count: int,
) -> tuple[Float[Array, "b h s r k"], Float[Array, "b h s r v"]]:
    """The ``count`` tokens of each segment for which its state's error |v - M(k)|^2 is largest.

    Ties go to the older token. The choice has no gradient. If the error of any token is NaN, the
    choice is unknown, and the keys of the chosen tokens are NaN.

    Args:
      memory: the rule.
      matrices: those of the states at the segments' ends, (b, h, s, in, out) each.
      key: the keys of the segments' tokens, NaN for tokens that were not finite.
      value: their values.
      there: which tokens belong to the segment; None for all. The others rank last.
      count: r, how many tokens to keep of each segment.
    """
    clean, broken = finite_rows(key)
    value = jnp.where(broken[..., None], 0, value)
    read: Any = memory.read
    for _ in range(3):
        read = jax.vmap(read)
    with jax.default_matmul_precision("highest"):
        error = lax.stop_gradient(value) - read(*lax.stop_gradient((tuple(matrices), clean)))
        error = jnp.sum(error**2, axis=-1)
    unknown = broken | jnp.isnan(error)
    error = jnp.where(jnp.isnan(error), -jnp.inf, error)
    if there is not None:
        unknown &= there[:, None]
        error = jnp.where(there[:, None], error, -jnp.inf)
    _, chosen = largest(error, count)
    key, value = (jnp.take_along_axis(x, chosen[..., None], axis=3) for x in (clean, value))
    return jnp.where(unknown.any(axis=-1)[..., None, None], jnp.nan, key), value


def exact_of_blocks(
    memory: Memory,
    matrices: Matrices,
    blocks: Blocks,
    last: np.ndarray | Int[Array, "_ s"],
    owner: Int[Array, "_ n c"] | None,
    span: int,
    count: int,
    longest: int,
) -> Exact:
    """The tokens to keep of each segment, where segments are runs of blocks.

    Args:
      memory: the rule.
      matrices: those of the states at the segments' ends, (b, h, s, in, out) each.
      blocks: all tokens.
      last: the last block of each segment.
      owner: a number for each token, equal for the tokens that a state covers; None if a state
        covers all tokens of its block.
      span: the most blocks in a segment.
      count: how many tokens to keep of each segment.
      longest: the most tokens that a segment can have.
    """
    assert blocks.rows.bad is not None
    tokens = blocks.tokens
    bad = blocks.rows.bad.reshape(tokens.key.shape[:4])
    key = jnp.where(bad[..., None], jnp.nan, tokens.key)
    there = None
    if span == 1 and isinstance(last, np.ndarray):
        key, value = key[:, :, last[0]], tokens.value[:, :, last[0]]
        if owner is not None:
            owner = owner[:, last[0]]
            there = owner == owner[:, :, -1:]
    else:
        assert owner is not None
        place = jnp.asarray(last)[..., None] + np.arange(1 - span, 1)[None, None]
        inside, place = place >= 0, jnp.maximum(place, 0)

        def take(x: Array, axis: int) -> Array:
            rows = jnp.broadcast_to(place, (len(x), *place.shape[1:]))
            taken = jax.vmap(lambda x, place: jnp.take(x, place, axis=axis - 1))(x, rows)
            return taken.reshape(*taken.shape[: axis + 1], -1, *taken.shape[axis + 3 :])

        key, value = take(key, 2), take(tokens.value, 2)
        owner = jnp.broadcast_to(owner, (max(len(owner), len(place)), *owner.shape[1:]))
        owner = take(owner, 1)
        there = (owner == owner[:, :, -1:]) & jnp.repeat(inside, tokens.key.shape[3], axis=2)
    kept = worst_recalled(memory, matrices, key, value, there, count)
    counts = None if there is None else jnp.minimum(there.sum(axis=2, dtype=jnp.int32), count)
    return Exact(*kept, longest, counts)


def scores_of_tokens(
    connector: Float[Array, "b h n c u"], candidates: Candidates, gate: Gate, pooling: str
) -> Float[Array, "b h n c slots r"]:
    """The relevance of the tokens kept beside the states in all slots.

    Each token is scored as a state of its own: its key is the pooled key, and it counts 1 / C
    times, where C is the most tokens in a segment. Tokens of invisible states score -inf.
    """
    exact = candidates.exact
    assert exact is not None
    count = exact.key.shape[3]
    flat = exact.key.reshape(*exact.key.shape[:2], -1, exact.key.shape[-1])
    each = np.arange(count)[None, None, None]
    where = np.where if _static(candidates.states) else jnp.where
    states = candidates.states[..., None]
    states = where(states >= 0, states * count + each, -1)
    counts = candidates.counts
    if counts is not None:
        counts = _each(jnp.minimum(counts, 1), count)
    if exact.counts is not None:
        assert counts is None  # streams have no documents
        counts = exact.counts[:, None]
        if not _in_order(candidates):
            counts = _by_slot(candidates, exact.counts)
        counts = (each < counts[..., None]).astype(jnp.int32)
        counts = counts.reshape(*counts.shape[:2], -1)
    of_tokens = candidates._replace(
        states=states.reshape(*states.shape[:2], -1),
        distances=_each(candidates.distances, count),
        keys=lambda pooling: Keys(connector, states=flat),  # in place of live keys, not used here
        same_document=_each(candidates.same_document, count),
        counts=counts,
        held=_each(candidates.held, count),
    )
    relevance = scores(connector, of_tokens, gate, pooling)[0] - math.log(exact.longest)
    return relevance.reshape(*relevance.shape[:-1], -1, count)


def read_of_tokens(
    candidates: Candidates, gates: Float[Array, "b h n c slots r"]
) -> Float[Array, "b h n c v"]:
    """The gated sum of the values of the tokens in all slots."""
    exact = candidates.exact
    assert exact is not None
    if _in_order(candidates):
        return jnp.einsum("bhncsr,bhsrv->bhncv", gates, exact.value, precision="highest")
    value = jnp.moveaxis(_by_slot(candidates, jnp.moveaxis(exact.value, 2, 1)), 3, 1)
    return jnp.einsum("bhncsr,bhnsrv->bhncv", gates, value, precision="highest")


def scores_of_chosen(
    connector: Float[Array, "b h n c u"],
    exact: Exact,
    gate: Gate,
    chosen: Int[Array, "b h n c s"],
    distances: Int[Array, "b h n c s"],
) -> Float[Array, "b h n c s r"]:
    """``scores_of_tokens`` for the states that each token has chosen; -inf for a choice of -1."""

    def scores(tokens: Array, rows: Array, weights: Array) -> Array:
        def score(row: Array, token: Array) -> Array:
            return gate.score(row[:-1], token, row[-1].astype(jnp.int32))

        every = jax.vmap(jax.vmap(score, in_axes=(None, 0)), in_axes=(0, None))
        return every(rows, tokens) * weights[:, None]

    rows = jnp.broadcast_to(connector[..., None, :], (*chosen.shape, connector.shape[-1]))
    rows = jnp.concatenate([rows, distances[..., None].astype(rows.dtype)], axis=-1)
    with jax.default_matmul_precision("highest"):
        relevance = _read_chosen(exact, 0, scores, rows, chosen) - math.log(exact.longest)
    there = chosen[..., None] >= 0
    if exact.counts is not None:
        counts = jnp.broadcast_to(exact.counts, (len(chosen), exact.counts.shape[1]))
        counts = jax.vmap(lambda counts, chosen: counts[chosen])(counts, jnp.maximum(chosen, 0))
        each = np.arange(relevance.shape[-1]).reshape(1, 1, 1, 1, 1, -1)
        there &= each < counts[..., None]
    return jnp.where(there, relevance, -jnp.inf)


def read_of_chosen(
    exact: Exact, chosen: Int[Array, "b h n c s"], gates: Float[Array, "b h n c s r"]
) -> Float[Array, "b h n c v"]:
    """``read_of_tokens`` for the states that each token has chosen."""

    def read(tokens: Array, rows: Array, weights: Array) -> Array:
        return weights[:, None] * (rows @ tokens)

    with jax.default_matmul_precision("highest"):
        return _read_chosen(exact, 1, read, gates, chosen).sum(axis=-2)


def _read_chosen(
    exact: Exact,
    which: int,
    read: Callable[[Array, Array, Array], Array],
    rows: Float[Array, "b h n c s in"],
    chosen: Int[Array, "b h n c s"],
) -> Float[Array, "b h n c s out"]:
    """``read(tokens, rows, weights)`` of the keys or the values beside each chosen state.

    Few choices are gathered one by one. If there are more choices than states, those of one state
    are read together.
    """
    flat, tokens = chosen.reshape(*chosen.shape[:2], -1), (exact.key, exact.value)[which]
    ones = jnp.ones(flat.shape, rows.dtype)
    rows = rows.reshape(*flat.shape, rows.shape[-1])
    if flat.shape[2] <= tokens.shape[2]:
        near = _taken(exact, which, jnp.maximum(flat, 0))
        near = jnp.where(flat[..., None, None] >= 0, near, 0)
        for _ in range(3):
            read = jax.vmap(read)
        y = read(near, rows[..., None, :], ones[..., None])[..., 0, :]
    else:

        def of_state(matrices: Matrices, rows: Array, weights: Array) -> Array:
            return read(matrices[0], rows, weights)

        by_row = rows[:, :, None], ones[:, :, None, :, None], flat[:, :, None, :, None]
        y = grouped_read(of_state, (tokens,), *by_row, implementation="xla")
    return y.reshape(*chosen.shape, -1)


def _taken(exact: Exact, which: int, states: Int[Array, "b h m"]) -> Float[Array, "b h m r _"]:
    """The keys or the values of the tokens beside these states."""
    if exact.take is not None:
        return exact.take(states)[which]
    return jnp.take_along_axis((exact.key, exact.value)[which], states[..., None, None], axis=2)


def stored_exact(
    key: Float[Array, "b h s r k"], value: Float[Array, "b h s r v"]
) -> tuple[Float[Array, "b h s r k"], Float[Array, "b h s r v"]]:
    """A cache's keys and values, as ``Exact`` has them."""
    value, broken = finite_rows(value)
    return jnp.where(broken[..., None], jnp.nan, key), value


def _in_order(candidates: Candidates) -> bool:
    """Whether slot i is known to hold state i or none."""
    exact = candidates.exact
    assert exact is not None
    table = exact.table is not None and candidates.states is exact.table
    return table or in_order(candidates.states, exact.key.shape[2])


def _by_slot(candidates: Candidates, x: Array) -> Array:
    """Gathers entries of states, (_, states, ...), by slot, (b, n, slots, ...)."""
    states = jnp.maximum(jnp.asarray(candidates.states), 0)
    rows = max(len(x), len(states))
    x, states = (jnp.broadcast_to(each, (rows, *each.shape[1:])) for each in (x, states))
    return jax.vmap(lambda x, states: x[states])(x, states)


def _each(x: Any, count: int) -> Any:
    """Repeats each entry of the last axis ``count`` times."""
    if x is None:
        return None
    repeated = (np if _static(x) else jnp).broadcast_to(x[..., None], (*x.shape, count))
    return repeated.reshape(*x.shape[:-1], -1)


def _static(x: Any) -> bool:
    return isinstance(x, np.ndarray)
