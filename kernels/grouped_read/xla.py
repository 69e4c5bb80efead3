"""The grouped read in plain XLA: cost grows with the choices, not with the number of states.

Blocks of rows that read one state are visited a few at a time, and the backward pass recomputes the
reads.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from memcache_jax._typing import Array, Bool, Float, Int, Matrices
from memcache_jax.kernels._dispatch import for_each_unit
from memcache_jax.kernels.grouped_read._blocks import arrange, most_blocks, of_chosen, take

_ROWS = 64  # in a block
_BLOCKS = 16  # visited at once


def grouped_read(
    read: Callable[..., Array],
    bank: Matrices,
    query: Float[Array, "b h n c k"],
    gates: Float[Array, "b h n c s"],
    states: Int[Array, "b h n c s"],
) -> Float[Array, "b h n c v"]:
    """See ``api.grouped_read``."""
    batch, heads, n, c, choices = gates.shape
    units, num_states = batch * heads, jax.tree.leaves(bank)[0].shape[2]
    visits = -(-most_blocks(n * c * choices, num_states, _ROWS) // _BLOCKS)
    blocks = arrange(states.reshape(units, -1), num_states, _ROWS, visits * _BLOCKS)

    def split(x: Array) -> Array:
        return x.reshape(batch, heads, visits, _BLOCKS, _ROWS, *x.shape[2:])

    rows = take(query.reshape(units, n * c, -1), blocks.pair // choices)
    weights = take(gates.reshape(units, -1), blocks.pair)
    state = blocks.state.reshape(batch, heads, visits, _BLOCKS)
    chosen = blocks.chosen.reshape(batch, heads, num_states)
    y = _read_blocks(read, state, chosen, bank, split(rows), split(weights))
    every = take(y.reshape(units, -1, y.shape[-1]), blocks.place)
    return every.reshape(batch, heads, n, c, choices, -1).sum(axis=-2)


def _read_blocks(
    read: Callable[..., Array],
    state: Int[Array, "b h w g"],
    chosen: Bool[Array, "b h states"],
    bank: Matrices,
    rows: Float[Array, "b h w g rows k"],
    gates: Float[Array, "b h w g rows"],
) -> Float[Array, "b h w g rows v"]:
    """Reads every block of rows from its state, in w visits of g blocks each."""
    every = jax.vmap(read)

    def forward_unit(state, chosen, bank, rows, gates):
        del chosen

        def visit(_, xs):
            state, rows, gates = xs
            return None, every(jax.tree.map(lambda m: m[state], bank), rows, gates)

        return lax.scan(visit, None, (state, rows, gates))[1]

    def backward_unit(state, chosen, bank, rows, gates, cotangent):
        def visit(total, xs):
            state, rows, gates, cotangent = xs
            states = jax.tree.map(lambda m: m[state], bank)
            _, pull = jax.vjp(every, states, rows, gates)
            d_states, d_rows, d_gates = pull(cotangent)
            total = jax.tree.map(lambda t, d: t.at[state].add(d), total, d_states)
            return total, (d_rows, d_gates)

        zeros = jax.tree.map(jnp.zeros_like, bank)
        total, (d_rows, d_gates) = lax.scan(visit, zeros, (state, rows, gates, cotangent))
        return of_chosen(chosen, total), d_rows, d_gates

    @jax.custom_vjp
    def read_all(*arguments):
        return for_each_unit(forward_unit, 2)(*arguments)

    def forward(*arguments):
        return read_all(*arguments), arguments

    def backward(residuals, cotangent):
        gradients = for_each_unit(backward_unit, 2)(*residuals, cotangent)
        return None, None, *gradients

    read_all.defvjp(forward, backward)
    return read_all(state, chosen, bank, rows, gates)
