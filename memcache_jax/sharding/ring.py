"""Cached states that pass around the parts of a sequence, each of which reads them as they come.

A device holds its own states, the part that it reads, and the one in transit.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from memcache_jax._typing import Array, Float, Matrices
from memcache_jax.engine.types import OfBlocks, OfTokens
from memcache_jax.kernels.bank_read import bank_read
from memcache_jax.kernels.grouped_read import grouped_read


def read_blocks(
    read: Callable[..., Array],
    bank: Matrices,
    query: Float[Array, "b h n c k"],
    selection: OfBlocks,
    implementation: str | None,
    axis: Any,
) -> Float[Array, "b h n c v"]:
    """The gated sum of reads of the states of all parts along a mesh axis, in a ``shard_map``.

    ``bank`` and ``query`` are this part's. In the selection, slot i holds state i of all parts, or
    none.
    """
    count = bank[0].shape[2]
    slots = lax.axis_size(axis) * count
    states = jnp.broadcast_to(selection.states, (len(query), *selection.states.shape[1:]))
    gates, states = _filled(selection.gates, slots, 0), _filled(states, slots, -1)

    def shares(part: Array, states: Array) -> Array:
        return jnp.ones((), jnp.int32)

    def share(part: Array, _: Array, bank: Matrices, rows: tuple, states: Array) -> Array:
        query, gates = rows
        begin = part * count
        gates, states = (
            lax.dynamic_slice_in_dim(x, begin, count, axis=-1) for x in (gates, states)
        )
        states = jnp.where(states >= 0, states - begin, -1)
        return bank_read(read, bank, query, gates, states, implementation=implementation)

    return _over_ring(share, shares, bank, (query, gates), states, axis)


def _filled(x: Array, size: int, value: int) -> Array:
    """The array with a last axis of that size."""
    missing = [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])]
    return jnp.pad(x, missing, constant_values=value)


def read_tokens(
    read: Callable[..., Array],
    bank: Matrices,
    query: Float[Array, "b h n c k"],
    selection: OfTokens,
    implementation: str | None,
    axis: Any,
) -> Float[Array, "b h n c v"]:
    """``read_blocks`` where each token has states of its own.

    Tokens read the part that passes by only if they selected a state of it. How many (token,
    choice) pairs that are depends on the data, so they are read a fixed number at a time: all parts
    together cost about as much as one read of all pairs.
    """
    states, gates = selection.states, selection.gates
    (batch, heads), tokens, choices = gates.shape[:2], query.shape[2:4], gates.shape[-1]
    units, parts, count = batch * heads, lax.axis_size(axis), bank[0].shape[2]
    flat = gates.reshape(units, -1), states.reshape(units, -1)
    pairs = flat[0].shape[1]
    size = -(-pairs // parts)
    # With a gate of zero there is no state, or its read changes nothing.
    owner = jnp.where(flat[0] > 0, flat[1] // count, parts)
    order = jnp.argsort(owner, axis=1, stable=True)
    find = jax.vmap(jnp.searchsorted, in_axes=(0, None))
    begin = find(jnp.take_along_axis(owner, order, axis=1), jnp.arange(parts + 1))

    def shares(part: Array, index: tuple) -> Array:
        _, _, begin = index
        return jnp.max(-(-(begin[:, part + 1] - begin[:, part]) // size))

    def share(part: Array, number: Array, bank: Matrices, rows: tuple, index: tuple) -> Array:
        """The contribution of one share's pairs to all outputs."""
        (query, gates), (states, order, begin) = rows, index

        def taken(query, gates, states, order, first, after):
            place = first + number * size + jnp.arange(size)
            pair = order.at[place].get(mode="fill", fill_value=pairs)
            pair = jnp.where(place < after, pair, pairs)
            token = pair // choices
            at = dict(mode="fill", fill_value=0)
            state = states.at[pair].get(**at) - part * count
            return token, query.at[token].get(**at), gates.at[pair].get(**at), state.clip(min=0)

        token, x, weights, state = jax.vmap(taken)(
            query, gates, states, order, begin[:, part], begin[:, part + 1]
        )

        def rowwise(x: Array, *last: int) -> Array:
            return x.reshape(batch, heads, 1, size, *last)

        y = grouped_read(
            read,
            bank,
            rowwise(x, x.shape[-1]),
            rowwise(weights, 1),
            rowwise(state, 1),
            implementation=implementation,
        ).reshape(units, size, -1)
        zeros = jnp.zeros((units, query.shape[1], y.shape[-1]), y.dtype)
        return jax.vmap(lambda total, token, y: total.at[token].add(y, mode="drop"))(
            zeros, token, y
        )

    rows = query.reshape(units, -1, query.shape[-1]), flat[0]
    y = _over_ring(share, shares, bank, rows, (flat[1], order, begin), axis)
    return y.reshape(batch, heads, *tokens, -1)


def _over_ring(
    share: Callable[..., Array],
    shares: Callable[[Array, Any], Array],
    bank: Matrices,
    rows: Any,
    index: Any,
    axis: Any,
) -> Array:
    """Returns the sum of all shares of this part and those before it, as their states pass by.

    While one part's states are read, the next are in transit. The backward pass sends them around
    once more, each with its gradient, which ends on the device of its state.

    Args:
      share: (part, number, bank of that part, rows, index) -> a term of the sum.
      shares: (part, index) -> how many shares that part has.
      bank: the states of this part.
      rows: the other inputs with gradients.
      index: inputs without gradients.
      axis: the axis of the mesh.
    """
    parts = lax.axis_size(axis)
    onward = functools.partial(
        lax.ppermute, axis_name=axis, perm=[(part, (part + 1) % parts) for part in range(parts)]
    )

    def visit(hop: Array | int, index: Any, add: Callable, total: Any) -> Any:
        """Adds to the total the shares of the part that arrives after so many hops."""
        here = lax.axis_index(axis)
        part = (here - hop) % parts
        number = jnp.where(hop <= here, shares(part, index), 0)
        return lax.fori_loop(0, number, functools.partial(add, part), total)

    @jax.custom_vjp
    def read_all(bank: Matrices, rows: Any, index: Any) -> Array:
        def read(hop: Array | int, bank: Matrices, y: Array) -> Array:
            def add(part: Array, number: Array, y: Array) -> Array:
                return y + share(part, number, bank, rows, index)

            return visit(hop, index, add, y)

        def turn(carry: tuple, hop: Array) -> tuple[tuple, None]:
            bank, y = carry
            return (onward(bank), read(hop, bank, y)), None

        y = jax.eval_shape(share, 0, 0, bank, rows, index)
        carry, _ = lax.scan(turn, (bank, jnp.zeros(y.shape, y.dtype)), jnp.arange(parts - 1))
        return read(parts - 1, *carry)

    def forward(bank: Matrices, rows: Any, index: Any) -> tuple[Array, tuple]:
        return read_all(bank, rows, index), (bank, rows, index)

    def backward(residuals: tuple, d_y: Array) -> tuple[Matrices, Any, None]:
        bank, rows, index = residuals

        def read(hop: Array | int, bank: Matrices, totals: tuple) -> tuple:
            def add(part: Array, number: Array, totals: tuple) -> tuple:
                _, pull = jax.vjp(
                    lambda bank, rows: share(part, number, bank, rows, index), bank, rows
                )
                return jax.tree.map(jnp.add, totals, pull(d_y))

            return visit(hop, index, add, totals)

        def turn(carry: tuple, hop: Array) -> tuple[tuple, None]:
            bank, totals = carry
            d_bank, d_rows = read(hop, bank, totals)
            return (onward(bank), (onward(d_bank), d_rows)), None

        totals = jax.tree.map(jnp.zeros_like, (bank, rows))
        carry, _ = lax.scan(turn, (bank, totals), jnp.arange(parts - 1))
        d_bank, d_rows = read(parts - 1, *carry)
        return onward(d_bank), d_rows, None

    read_all.defvjp(forward, backward)
    return read_all(bank, rows, index)
