"""The gated bank read in plain XLA: work in proportion to the pairs that are really read.

The (block, slot) pairs of the plan are visited in groups of one pair per block on average: a group
gathers its blocks and states, reads them in one batched product, and adds into the output. The
backward pass visits the same groups and recomputes the reads, so that no read of a pair is
kept.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memcache_jax._typing import Array, Float, Matrices
from memcache_jax.kernels._units import for_each_unit


def bank_read(
    read: Callable[..., Array],
    bank: Matrices,
    query: Float[Array, "b h n c k"],
    gates: Float[Array, "b h n c r"],
    reads: np.ndarray,
) -> Float[Array, "b h n c v"]:
    """See ``api.bank_read``."""
    groups = _pair_groups(reads)
    row = jax.eval_shape(
        read,
        jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape[3:], m.dtype), bank),
        jax.ShapeDtypeStruct(query.shape[3:], query.dtype),
    )
    if not groups[0].size:
        return jnp.zeros((*query.shape[:3], *row.shape), row.dtype)

    def take(bank, query, gates, group):
        """The states, rows and gates of a group's pairs."""
        block, slot, state, real = group
        states = jax.tree.map(lambda matrix: matrix[state], bank)
        return states, query[block], jnp.where(real[:, None], gates[block, :, slot], 0)

    pairs = jax.vmap(read)

    def forward_unit(bank, query, gates):
        def visit(total, group):
            return total.at[group[0]].add(pairs(*take(bank, query, gates, group))), None

        return lax.scan(visit, jnp.zeros((query.shape[0], *row.shape), row.dtype), groups)[0]

    def backward_unit(bank, query, gates, cotangent):
        def visit(totals, group):
            block, slot, state, real = group
            _, pull = jax.vjp(pairs, *take(bank, query, gates, group))
            d_states, d_query, d_gates = pull(cotangent[block])
            states, queries, every_gate = totals
            return (
                jax.tree.map(lambda total, d: total.at[state].add(d), states, d_states),
                queries.at[block].add(d_query),
                every_gate.at[block, :, slot].add(jnp.where(real[:, None], d_gates, 0)),
            ), None

        zeros = jax.tree.map(jnp.zeros_like, (bank, query, gates))
        return lax.scan(visit, zeros, groups)[0]

    @jax.custom_vjp
    def gated_read(bank, query, gates):
        return for_each_unit(forward_unit, 2)(bank, query, gates)

    def forward(bank, query, gates):
        return gated_read(bank, query, gates), (bank, query, gates)

    def backward(residuals, cotangent):
        return for_each_unit(backward_unit, 2)(*residuals, cotangent)

    gated_read.defvjp(forward, backward)
    return gated_read(bank, query, gates)


def _pair_groups(reads: np.ndarray) -> tuple[np.ndarray, ...]:
    """Lists (block, slot, state, real) of the pairs, (groups, pairs in a group) each.

    The last group is filled up with pairs that are not real.
    """
    block, slot = np.nonzero(reads >= 0)
    size = reads.shape[0]
    groups = -(-len(block) // size)
    fill = (0, groups * size - len(block))
    lists = (block, slot, reads[block, slot], np.ones(len(block), bool))
    return tuple(np.pad(values, fill).reshape(groups, size) for values in lists)
