"""Memory Caching token by token, as the paper writes it: what every fast path must equal.

Nothing here is chunked or parallel in time, and gradients are automatic differentiation's.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memcache_jax._typing import Array, Float, Int, State
from memcache_jax.aggregation import Aggregation
from memcache_jax.memories import Memory
from memcache_jax.segmentation import ReadPlan


def memory_caching(
    tokens: tuple,
    weights: Mapping[str, Array],
    document: Int[Array, "b t"] | None,
    **configuration: Any,
) -> Float[Array, "b h t v"]:
    """Every head of every row by itself, with the arguments of ``caching``'s fast path."""
    if document is None:
        document = jnp.zeros((tokens[0].shape[0], tokens[0].shape[2]), int)
    heads = jax.vmap(functools.partial(_one_head, **configuration), in_axes=(0, 0, None))
    return jax.vmap(heads, in_axes=(0, None, 0))(tokens, weights, document)


def _one_head(
    tokens: tuple,
    weights: Mapping[str, Array],
    document: Int[Array, "t"],
    *,
    memory: Memory,
    aggregation: Aggregation,
    plan: ReadPlan,
    start: str,
) -> Float[Array, "t v"]:
    query, key, value, connector, controls = tokens
    length, segment = key.shape[0], plan.block_size
    initial = memory.init(weights, key.shape[-1], value.shape[-1], key.dtype)
    segment_begins = np.isin(np.arange(length), plan.first * segment)
    document_begins = document != jnp.pad(document[:-1], (1, 0))

    def run(first: int, after: int, restart: bool) -> State:
        """The states after each token in [first, after), from the initial state at ``first``."""

        def token(carry, t):
            state, anchor = carry
            begins = jnp.asarray(segment_begins)[t] & restart | document_begins[t]
            state = jax.tree.map(lambda new, old: jnp.where(begins, new, old), initial, state)
            begins = (t % segment % (memory.gradient_chunk or 1) == 0) | document_begins[t]
            anchor = jax.tree.map(lambda new, old: jnp.where(begins, new, old), state, anchor)
            coefficients = jax.tree.map(lambda x: x[t], controls)
            state = memory.step(state, anchor, key[t], value[t], coefficients)
            return (state, anchor), state

        return lax.scan(token, (initial, initial), jnp.arange(first, after))[1]

    pool = jnp.mean if aggregation.pooling == "mean" else jnp.sum
    live = run(0, length, restart=start == "independent")
    bank, pooled, owner = [], [], []
    for first, after in (plan.buckets * segment).tolist():
        fresh = start == "independent"
        states, last = (run(first, after, restart=False), -1) if fresh else (live, after - 1)
        bank.append(memory.matrices(jax.tree.map(lambda x, last=last: x[last], states)))
        same = document[first:after] == document[after - 1]
        pooled.append(pool(key[first:after], axis=0, where=same[:, None]))
        owner.append(document[after - 1])

    outputs = []
    for block, slots in enumerate(plan.reads.tolist()):
        after = min((block + 1) * segment, length)
        slots = [bucket for bucket in slots if bucket >= 0]
        distances = plan.distances[block, : len(slots)].tolist()

        def token(t, begins=plan.first[block] * segment, slots=slots, distances=distances):
            online = memory.matrices(jax.tree.map(lambda x: x[t], live))
            states = [bank[bucket] for bucket in slots] + [online]
            so_far = (jnp.arange(length) >= begins) & (jnp.arange(length) <= t)
            keys = pool(key, axis=0, where=(so_far & (document == document[t]))[:, None])
            if aggregation.gate == "content":
                scores = jnp.stack([*(pooled[bucket] for bucket in slots), keys]) @ connector[t]
            elif aggregation.gate == "position":
                farthest = connector.shape[-1] - 1
                scores = jnp.stack([connector[t, min(d, farthest)] for d in [*distances, 0]])
            else:
                scores = jnp.zeros(len(states), key.dtype)
            visible = jnp.array([owner[bucket] for bucket in slots], int) == document[t]
            cached = jnp.where(visible, scores[:-1], -jnp.inf)
            cached_gates, online_gate = aggregation.gates(cached, scores[-1])
            return aggregation.combine_token(
                memory,
                jax.tree.map(lambda *matrices: jnp.stack(matrices), *states),
                query[t],
                jnp.append(cached_gates, online_gate),
            )

        outputs.append(jax.vmap(token)(jnp.arange(block * segment, after)))
    return jnp.concatenate(outputs)
