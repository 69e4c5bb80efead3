"""The gated bank read in plain XLA, with work in proportion to the pairs that are read.

The (block, slot) pairs of the plan are visited in groups of up to one pair per block: a group
gathers its blocks and states, reads them in one batched product, and adds into the output. The
backward pass visits the same groups and recomputes the reads, so that none of them is kept. Pairs
that pad a group have a block and a state beyond the last, so that their sums are dropped.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memcache_jax._typing import Array, Float, Int, Matrices
from memcache_jax.kernels._dispatch import for_each_unit

_FEW_ROWS = 256  # fewer are not read at once
_SHARE = 4  # what a read at once makes is at most the bank's size over this


def bank_read(
    read: Callable[..., Array],
    bank: Matrices,
    query: Float[Array, "b h n c k"],
    gates: Float[Array, "b h n c r"],
    reads: np.ndarray | Array,
) -> Float[Array, "b h n c v"]:
    """See ``api.bank_read``."""
    row = jax.eval_shape(
        read,
        jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape[3:], m.dtype), bank),
        jax.ShapeDtypeStruct(query.shape[3:], query.dtype),
    )
    if not reads.shape[-1]:
        return jnp.zeros_like(query, row.dtype, (*query.shape[:3], *row.shape))
    static = isinstance(reads, np.ndarray)
    count, few = query.shape[3], False
    if isinstance(reads, np.ndarray) and len(reads) == 1:
        if count == 1:
            return _read_at_once(read, bank, query, gates, reads)
        few = _SHARE * count <= min(matrix.shape[-2] for matrix in jax.tree.leaves(bank))
    num_states = jax.tree.leaves(bank)[0].shape[2]
    if static:
        groups = _pair_groups(reads, num_states)
    else:
        groups = _slot_groups(reads, num_states, rows=query.shape[3])

    def take(bank, query, gates, group):
        """The states, rows and gates of a group's pairs, arbitrary ones for padding."""
        block, slot, state = group
        states = jax.tree.map(lambda matrix: matrix.at[state].get(mode="clip"), bank)
        rows = query.at[block].get(mode="clip")
        return states, rows, gates.at[block, :, slot].get(mode="clip")

    pairs = jax.vmap(read)

    def forward_unit(groups, bank, query, gates):
        def visit(total, group):
            rows = pairs(*take(bank, query, gates, group))
            return total.at[group[0]].add(rows, mode="drop"), None

        zeros = jnp.zeros_like(query, row.dtype, (query.shape[0], *row.shape))
        return lax.scan(visit, zeros, groups)[0]

    def backward_unit(groups, bank, query, gates, cotangent):
        def visit(totals, group):
            block, slot, state = group
            _, pull = jax.vjp(pairs, *take(bank, query, gates, group))
            d_states, d_query, d_gates = pull(cotangent.at[block].get(mode="clip"))
            states, queries, every_gate = totals
            return (
                jax.tree.map(lambda t, d: t.at[state].add(d, mode="drop"), states, d_states),
                queries.at[block].add(d_query, mode="drop"),
                every_gate.at[block, :, slot].add(d_gates, mode="drop"),
            ), None

        zeros = jax.tree.map(jnp.zeros_like, (bank, query, gates))
        return lax.scan(visit, zeros, groups)[0]

    def for_each(unit, groups, *args):
        if static:  # all units have the same groups
            return for_each_unit(functools.partial(unit, groups), 2)(*args)
        heads = (len(reads), query.shape[1])
        groups = jax.tree.map(
            lambda x: jnp.broadcast_to(x[:, None], (*heads, *x.shape[1:])), groups
        )
        return for_each_unit(unit, 2)(groups, *args)

    @jax.custom_vjp
    def gated_read(groups, bank, query, gates):
        if few:
            assert isinstance(reads, np.ndarray)
            return _read_at_once(read, bank, query, gates, reads)
        return for_each(forward_unit, groups, bank, query, gates)

    def forward(groups, bank, query, gates):
        return gated_read(groups, bank, query, gates), (groups, bank, query, gates)

    def backward(residuals, cotangent):
        return None, *for_each(backward_unit, *residuals, cotangent)

    gated_read.defvjp(forward, backward)
    return gated_read(groups, bank, query, gates)


def _read_at_once(
    read: Callable[..., Array],
    bank: Matrices,
    query: Float[Array, "b h 1 c k"],
    gates: Float[Array, "b h 1 c r"],
    reads: np.ndarray,
) -> Float[Array, "b h 1 c v"]:
    """Reads all states of one block at once; the backward pass of one token keeps little."""
    (real,) = np.nonzero(reads[0] >= 0)
    states = reads[0, real]
    if not np.array_equal(states, np.arange(jax.tree.leaves(bank)[0].shape[2])):
        bank = jax.tree.map(lambda matrix: matrix[:, :, states], bank)

    def unit(bank, query, gates):
        # The same rows for each state: with one axis less XLA transposes the states.
        rows = jnp.broadcast_to(query[0], (len(states), *query.shape[1:]))
        return jax.vmap(read, (0, 0, 1))(bank, rows, gates[0][:, real]).sum(axis=0)[None]

    return jax.vmap(jax.vmap(unit))(bank, query, gates)


def _pair_groups(reads: np.ndarray, num_states: int) -> tuple[np.ndarray, ...]:
    """Lists (block, slot, state) of the pairs, (groups, pairs in a group) each.

    They are as few groups as possible, all of one size, with at most as many pairs as there are
    blocks; the last one is padded.
    """
    block, slot = np.nonzero(reads >= 0)
    blocks = len(reads)
    groups = -(-len(block) // blocks)
    size = -(-len(block) // max(groups, 1))
    fill = (0, groups * size - len(block))
    lists = ((block, blocks), (slot, 0), (reads[block, slot], num_states))
    return tuple(
        np.pad(values, fill, constant_values=beyond).reshape(groups, size)
        for values, beyond in lists
    )


def _slot_groups(reads: Int[Array, "b n r"], num_states: int, rows: int) -> tuple[Array, ...]:
    """As ``_pair_groups``, (b, groups, pairs in a group), but with a pair for every slot.

    A group has one pair of every block, or several if blocks have few rows.
    """
    batch, blocks, slots = reads.shape
    together = min(slots, max(1, _FEW_ROWS // (blocks * rows)))
    groups = -(-slots // together)
    padded = jnp.pad(reads, ((0, 0), (0, 0), (0, groups * together - slots)), constant_values=-1)
    slot, block = np.meshgrid(np.arange(groups * together), np.arange(blocks), indexing="ij")
    states = jnp.moveaxis(padded, 2, 1)
    real = states >= 0
    lists = (
        jnp.where(real, block[None], blocks),
        np.minimum(slot, slots - 1)[None],
        jnp.where(real, states, num_states),
    )
    return tuple(
        jnp.broadcast_to(values, states.shape).reshape(batch, groups, -1) for values in lists
    )
