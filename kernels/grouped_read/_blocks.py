"""What the implementations of the grouped read share: pairs arranged into blocks of one state.

As in a mixture of experts, the (row, choice) pairs are sorted by state and each state's group is
padded to whole blocks, so that every block reads one state. Every state has at least one block. A
choice of -1 has no place.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memcache_jax._typing import Array, Bool, Int, Matrices


class Blocks(NamedTuple):
    """Where pairs lie in the blocks of each unit.

    Attributes:
      place: (units, pairs) the place of each pair, beyond the last if it chose no state.
      pair: (units, places) the pair at each place, beyond the last if there is none.
      state: (units, blocks) the state that each block reads, ascending.
      chosen: (units, states) whether any pair chose the state.
    """

    place: Array
    pair: Array
    state: Array
    chosen: Array


def most_blocks(pairs: int, num_states: int, rows: int) -> int:
    """The most blocks of ``rows`` rows that are needed, if every state's group has a padded one."""
    return -(-pairs // rows) + num_states


def arrange(
    states: Int[Array, "units pairs"], num_states: int, rows: int, num_blocks: int
) -> Blocks:
    """Arranges pairs that chose these states into blocks of ``rows`` rows."""

    def unit(states: Int[Array, "pairs"]) -> Blocks:
        states = jnp.where(states < 0, num_states, states)  # last, and dropped
        counts = jnp.zeros(num_states, jnp.int32).at[states].add(1, mode="drop")
        blocks = jnp.maximum(-(-counts // rows), 1)
        last_block = jnp.cumsum(blocks)
        order = jnp.argsort(states, stable=True)
        rank = jnp.arange(len(states)) - (jnp.cumsum(counts) - counts)[states[order]]
        place = (last_block - blocks)[states[order]] * rows + rank
        place = jnp.where(states[order] < num_states, place, num_blocks * rows)
        pair = jnp.full(num_blocks * rows, len(states)).at[place].set(order, mode="drop")
        state = jnp.searchsorted(last_block, jnp.arange(num_blocks), side="right")
        state = state.clip(max=num_states - 1).astype(jnp.int32)
        return Blocks(jnp.zeros_like(place).at[order].set(place), pair, state, counts > 0)

    return jax.vmap(unit)(states)


def of_chosen(chosen: Bool[Array, "*units states"], d_bank: Sequence[Array]) -> Matrices:
    """The gradients (*units, states, in, out), zero for states that were not chosen.

    Those have a block too, whose gradient is NaN if the state is, though nothing reads it.
    """
    return tuple(jnp.where(chosen[..., None, None], d, 0) for d in d_bank)


@jax.vmap
def take(rows: Array, index: Int[Array, "i"]) -> Array:
    """Rows of each unit by index, zero beyond the last."""
    return rows.at[index].get(mode="fill", fill_value=0)


def differentiable(kernels: Any, choices: int) -> Callable[..., Array]:
    """Returns the read of (blocks, bank, query, gates), all (units, ...), query and gates by token.

    The backward pass gathers too, and never scatters.

    Args:
      kernels: ``forward`` and ``backward`` on arrays by block: (state, bank, rows, weights) to
        rows, and with their cotangent to the gradients of bank, rows and weights.
      choices: states that a token chooses.
    """

    def by_place(blocks: Blocks, x: Array) -> Array:
        """Rows of tokens, (units, tokens, ...), in the order of the blocks."""
        x = take(x, blocks.pair // choices)
        return x.reshape(*blocks.state.shape, -1, *x.shape[2:])

    def by_token(blocks: Blocks, x: Array) -> Array:
        """The sum over the choices of each token."""
        x = take(x.reshape(len(x), -1, x.shape[-1]), blocks.place)
        return x.reshape(len(x), -1, choices, x.shape[-1]).sum(axis=2)

    def operands(blocks: Blocks, bank: Matrices, query: Array, gates: Array) -> tuple:
        weights = take(gates.reshape(len(gates), -1), blocks.pair)
        weights = weights.reshape(*blocks.state.shape, -1)
        return blocks.state, bank, by_place(blocks, query), weights

    @jax.custom_vjp
    def grouped_read(blocks, *arrays):
        return by_token(blocks, kernels.forward(*operands(blocks, *arrays)))

    def forward(blocks, *arrays):
        return grouped_read(blocks, *arrays), (blocks, arrays)

    def backward(residuals, cotangent):
        blocks, arrays = residuals
        d_bank, d_rows, d_weights = kernels.backward(
            *operands(blocks, *arrays), by_place(blocks, cotangent)
        )
        d_gates = take(d_weights.reshape(len(d_weights), -1), blocks.place)
        gradients = (
            of_chosen(blocks.chosen, d_bank),
            by_token(blocks, d_rows),
            d_gates.reshape(arrays[2].shape),
        )
        return None, *jax.tree.map(lambda d, x: d.astype(x.dtype), gradients, arrays)

    grouped_read.defvjp(forward, backward)
    return grouped_read


def by_kernels(
    make_kernels: Callable[[int], Any],
    rows: int,
    bank: Matrices,
    query: Array,
    gates: Array,
    states: Array,
) -> Array:
    """The grouped read of arguments as in ``api.grouped_read``, through the kernels of a platform.

    Args:
      make_kernels: makes the kernels for blocks of so many rows.
      rows: rows of a block.
      bank: as in ``api.grouped_read``, padded as the kernels need it; so is the query.
      query: see bank.
      gates: as in ``api.grouped_read``.
      states: as in ``api.grouped_read``.
    """
    batch, heads, n, c, choices = gates.shape
    units, num_states = batch * heads, bank[0].shape[2]
    flat = functools.partial(jnp.reshape, shape=(units, n * c * choices))
    blocks = arrange(flat(states), num_states, rows, most_blocks(n * c * choices, num_states, rows))
    y = differentiable(make_kernels(rows), choices)(
        blocks,
        tuple(m.reshape(units, *m.shape[2:]) for m in bank),
        query.reshape(units, n * c, -1),
        gates.reshape(units, n * c, choices),
    )
    return y.reshape(batch, heads, n, c, -1)
