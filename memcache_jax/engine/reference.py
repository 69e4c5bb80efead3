"""Memory Caching token by token, as the paper writes it: what every fast path must equal.

Nothing here is chunked or parallel in time, and gradients are automatic differentiation's.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memcache_jax._typing import Array, Float, Int, State
from memcache_jax._varying import vary, varying
from memcache_jax.aggregation import Aggregation
from memcache_jax.engine.borders import Borders
from memcache_jax.engine.types import Tokens
from memcache_jax.kernels._largest import largest
from memcache_jax.memories import Memory
from memcache_jax.segmentation import ReadPlan


def memory_caching(
    tokens: Tokens,
    weights: Mapping[str, Array],
    document: Int[Array, "b t"] | None,
    borders: Borders | None,
    **configuration: Any,
) -> Float[Array, "b h t v"]:
    """Every head of every row by itself: tokens (b, h, t, ...), and the document of each.

    Where tokens decide about segments, ``borders`` stand in for the plan's.
    """
    # Buckets of several segments are counted from the block in which a document begins.
    follows = document is not None and bool(configuration["plan"].spans_segments.any())
    if document is None:
        document = jnp.zeros((tokens.key.shape[0], tokens.key.shape[2]), int)
    one_head = functools.partial(_one_head, follows=follows, **configuration)
    heads = jax.vmap(one_head, in_axes=(0, 0, None, None))
    return jax.vmap(heads, in_axes=(0, None, 0, 0))(tokens, weights, document, borders)


def _one_head(
    tokens: Tokens,
    weights: Mapping[str, Array],
    document: Int[Array, "t"],
    borders: Any,
    *,
    memory: Memory,
    aggregation: Aggregation,
    plan: ReadPlan,
    start: str,
    longest: int,
    follows: bool,
) -> Float[Array, "t v"]:
    query, key, value, connector, controls, _ = tokens
    length, segment = key.shape[0], plan.block_size
    every = jnp.arange(length)
    where: Any = _planned(plan) if borders is None else _decided(plan, borders)
    segment_begins = jnp.isin(every, jnp.asarray(where.first) * segment)
    document_begins = document != jnp.pad(document[:-1], (1, 0))
    initial = memory.init(weights, key.shape[-1], value.shape[-1], key.dtype)
    initial = vary(initial, varying(key))

    def run(first: Any, count: int, restarts: bool) -> tuple[State, State]:
        """The states after each of ``count`` tokens, from the initial state at ``first``.

        Returns:
          The states that tokens read, and those that they leave to the next token and the cache.
        """
        chunk = memory.gradient_chunk or 1

        def token(carry, t):
            state, anchor, begun = carry
            begins = (segment_begins[t] & restarts) | document_begins[t]
            state = jax.tree.map(lambda new, old: jnp.where(begins, new, old), initial, state)
            begins = (t % segment % chunk == 0) | document_begins[t]
            anchor, begun = jax.tree.map(
                lambda new, old: jnp.where(begins, new, old), (state, t), (anchor, begun)
            )
            coefficients = jax.tree.map(lambda x: x[t], controls)
            state = memory.step(state, anchor, key[t], value[t], coefficients)
            last = t - jnp.arange(chunk)
            coefficients = jax.tree.map(lambda x: x[jnp.maximum(last, 0)], controls)
            closed = memory.closed(state, anchor, coefficients, last >= begun)
            ends = t % segment % chunk == chunk - 1
            left = jax.tree.map(lambda new, old: jnp.where(ends, new, old), closed, state)
            return (left, anchor, begun), (state, left)

        there = jnp.minimum(first + jnp.arange(count), length - 1)
        begun = vary(there[0], varying(key))
        return lax.scan(token, (initial, initial, begun), there)[1]

    def pool(first: Array, after: Array, of: Array) -> Float[Array, "k"]:
        """The pooled keys of a document's tokens in [first, after)."""
        seen = (first <= every) & (every < after) & (document == of)
        sums = jnp.sum(key, axis=0, where=seen[:, None])
        return sums / jnp.maximum(seen.sum(), 1) if aggregation.pooling == "mean" else sums

    def worst(matrices: Any, first: Array, after: Array, of: Array) -> tuple:
        """The tokens of a bucket that its state recalls worst, and which of them exist."""
        errors = jnp.sum((value - memory.read(matrices, key)) ** 2, axis=-1)
        there = (first <= every) & (every < after) & (document == of)
        unknown = jnp.any(there & jnp.isnan(errors))
        errors = jnp.where(there & ~jnp.isnan(errors), errors, -jnp.inf)
        _, chosen = largest(lax.stop_gradient(errors), min(aggregation.exact, length))
        return jnp.where(unknown, jnp.nan, key[chosen]), value[chosen], there[chosen]

    def spans(first: Array, after: Array, until: Array, of: Array) -> tuple[Array, Array]:
        """Pooled keys of equal spans of [first, after), of tokens before ``until``; which exist."""
        size = (after - first) // aggregation.num_keys
        begins = first + size * jnp.arange(aggregation.num_keys)
        ends = jnp.minimum(begins + size, until)

        def any_in(first: Array, after: Array) -> Array:
            return ((first <= every) & (every < after) & (document == of)).any()

        pools = jax.vmap(pool, in_axes=(0, 0, None))
        return pools(begins, ends, of), jax.vmap(any_in)(begins, ends)

    # What is cached, (shifts, buckets, ...): the plan's buckets, counted from each block in which a
    # document may begin. Those that end beyond the sequence are never read.
    live, left = run(0, length, restarts=start == "independent")
    shifts = np.arange(where.num_blocks if follows else 1)[:, None]
    first, after = ((where.buckets[None, :, side] + shifts) * segment for side in (0, 1))
    last = (np if borders is None else jnp).minimum(after, length) - 1
    if start == "checkpoint" or borders is not None:
        bank = memory.matrices(jax.tree.map(lambda x: x[last], left))
    else:
        bank = memory.matrices(_last_states(run, first, after - first, initial))
    owner = document[last]
    buckets = jnp.asarray(first), jnp.asarray(after)
    whole = buckets[1]
    if borders is not None:  # whose segments also begin with documents
        begun = jax.vmap(jax.vmap(lambda of: jnp.argmax(document == of)))(owner)
        buckets = jnp.maximum(first, begun // segment * segment), after
        whole = buckets[0] + where.segment_blocks[0] * segment
    pooled = jax.vmap(jax.vmap(spans))(buckets[0], whole, buckets[1], owner)
    exact = jax.vmap(jax.vmap(worst))(bank, *buckets, owner) if longest else None

    def read(t: Array) -> Array:
        begun = jnp.argmax(document == document[t]) // segment if follows else 0
        slots = jnp.asarray(where.reads)[t // segment - begun]
        visible = (slots >= 0) & (owner[begun, slots] == document[t])

        def seen(cached: Array) -> Array:
            rows = visible.reshape(-1, *[1] * (cached.ndim - 2))
            nothing = jnp.zeros((), cached.dtype)
            return jnp.where(rows, cached[begun, slots], nothing)  # 0 * NaN is NaN

        own = memory.matrices(jax.tree.map(lambda x: x[t], live))
        begins = jnp.asarray(where.first)[t // segment] * segment
        if borders is not None:
            begins = jnp.maximum(begins, jnp.argmax(document == document[t]) // segment * segment)
        ends = jnp.maximum(begins + segment, t + 1)
        if where.segment_blocks is not None:
            ends = begins + jnp.asarray(where.segment_blocks)[t // segment] * segment
        here = spans(begins, ends, t + 1, document[t])
        keys, known = (_joined(seen(x), y) for x, y in zip(pooled, here, strict=True))
        distances = jnp.append(jnp.asarray(where.distances)[t // segment - begun], 0)
        score = jax.vmap(aggregation.relevance.score, in_axes=(None, 0, None))
        scores = jax.vmap(score, in_axes=(None, 0, 0))(connector[t], keys, distances)
        scores = jnp.where(known, scores, -jnp.inf).max(axis=1)
        if where.log_counts is not None:
            scores = scores.at[:-1].add(where.log_counts)
        cached = jnp.where(visible, scores[:-1], -jnp.inf)
        added = jnp.zeros(value.shape[1:], value.dtype)
        if exact is None:
            gates, last = aggregation.gates(cached, scores[-1])
        else:
            keys, values, there = (x[begun, slots] for x in exact)
            of_tokens = jax.vmap(score, in_axes=(None, 0, 0))(connector[t], keys, distances[:-1])
            of_tokens -= math.log(longest)  # a token is one of the many that a state stands for
            of_tokens = jnp.where(visible[:, None] & there, of_tokens, -jnp.inf)
            gates, last, of_tokens = aggregation.gates_with_tokens(cached, scores[-1], of_tokens)
            values = jnp.where(of_tokens[..., None] != 0, values, 0)
            added = jnp.einsum("sr,srv->v", of_tokens, values)
        states = jax.tree.map(lambda cached, own: _joined(seen(cached), own), bank, own)
        return aggregation.read_token(memory, states, query[t], jnp.append(gates, last)) + added

    return lax.map(read, every)


class _Plan(NamedTuple):
    """What ``_one_head`` needs of a plan, or of borders that the tokens decided."""

    num_blocks: int
    block_size: int
    first: Any
    segment_blocks: Any
    buckets: Any
    reads: Any
    distances: Any
    log_counts: Any


def _planned(plan: ReadPlan) -> _Plan:
    """The plan of all rows."""
    given = plan.first, plan.segment_blocks, plan.buckets, plan.reads, plan.distances
    return _Plan(plan.num_blocks, plan.block_size, *given, None)


def _decided(plan: ReadPlan, borders: Any) -> _Plan:
    """The plan of one row's segments."""
    before, last, *_, log_counts = borders
    slot, block = np.arange(len(last)), np.arange(plan.num_blocks)
    first = jnp.searchsorted(before, before)  # of its segment, for each block
    buckets = jnp.stack([first[last], last + 1], axis=1) if len(last) else plan.buckets
    reads = jnp.where(last[None] < block[:, None], slot[None], -1)
    distances = jnp.maximum(before[:, None] - before[last][None], 1)
    given = first, plan.segment_blocks, buckets, reads, distances
    return _Plan(plan.num_blocks, plan.block_size, *given, log_counts)


def _joined(rows: Array, row: Array) -> Array:
    return jnp.concatenate([rows, row[None]])


def _last_states(
    run: Callable[..., tuple[State, State]], first: np.ndarray, counts: np.ndarray, initial: State
) -> State:
    """The last state of each run, (shifts, buckets, ...); those of a bucket are equally long."""
    parts = [jax.tree.map(lambda x: jnp.zeros((len(first), 0, *x.shape), x.dtype), initial)]
    for count in np.unique(counts).tolist():

        def last(first: Array, count: int = count) -> State:
            return jax.tree.map(lambda x: x[-1], run(first, count, restarts=False)[1])

        parts.append(jax.vmap(jax.vmap(last))(jnp.asarray(first[:, counts[0] == count])))
    place = np.argsort(np.argsort(counts[0], kind="stable"))
    return jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1)[:, place], *parts)
