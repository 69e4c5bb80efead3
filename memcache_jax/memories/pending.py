"""The tokens of a deep memory's chunk that are not yet written into its state.

All gradients of a chunk are taken at the state that it began with, so a token adds a rank-one
matrix to each layer. A stream that takes tokens one by one keeps these factors, reads through them,
and writes the state once, at the chunk's end: a token then writes two vectors per layer instead of
the weights and the momentum.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from memcache_jax._typing import Array, Controls, Float, Int, Matrices
from memcache_jax.memories.deep import DeepMemory
from memcache_jax.memories.deep_chunk import DeepChunk, DeepState


class Shares(NamedTuple):
    """The shares of the state (W, S) and of each token in the current weights, or momentum.

    They are ``decay W + momentum_decay S - sum_j mixing[j] deltas[j] inputs[j]^T``.
    """

    decay: Float[Array, ""]
    momentum_decay: Float[Array, ""] | None
    mixing: Float[Array, "m"]


class Pending(NamedTuple):
    """The first tokens of a chunk of m, over the state with which it began.

    Attributes:
      inputs: each layer's inputs, one column per token, (in, m); tokens to come have any finite
        numbers.
      deltas: gradients with respect to each layer's output, one row per token, (m, out); likewise.
      weights: the shares that make up the weights.
      momentum: the shares that make up the momentum; None for a rule without.
    """

    inputs: Matrices
    deltas: Matrices
    weights: Shares
    momentum: Shares | None


def no_tokens(memory: DeepMemory, state: DeepState) -> Pending:
    """A chunk before its first token."""
    size, dtype = memory.chunk_size, state.weights[0].dtype
    inputs = tuple(jnp.zeros((w.shape[0], size), dtype) for w in state.weights)
    deltas = tuple(jnp.zeros((size, w.shape[1]), dtype) for w in state.weights)
    one, zero, none = jnp.ones((), dtype), jnp.zeros((), dtype), jnp.zeros(size, dtype)
    if not state.momentum:
        return Pending(inputs, deltas, Shares(one, None, none), None)
    return Pending(inputs, deltas, Shares(one, zero, none), Shares(zero, one, none))


def with_token(
    memory: DeepMemory,
    state: DeepState,
    pending: Pending,
    place: Int[Array, ""],
    key: Float[Array, "1 k"],
    value: Float[Array, "1 v"],
    controls: Controls,
) -> tuple[Pending, DeepChunk]:
    """The chunk with one more token, at ``place``, and the view that reads the memory after it.

    Arguments are as for ``Memory.write``; the state is the one with which the chunk began.
    """
    inputs, deltas = memory.inner_gradient(state.weights, key, value)
    eta = memory.rates(controls, inputs, deltas)
    alpha = jnp.exp(controls["log_alpha"][0])
    here = jnp.arange(memory.chunk_size) == place

    def put(rows: Matrices, new: Matrices, axis: int) -> Matrices:
        # Factors left over from earlier chunks have zero mixing.
        fine = (jnp.where(jnp.isfinite(x), x, 0) for x in new)
        return tuple(
            lax.dynamic_update_slice_in_dim(old, jnp.moveaxis(x, 0, axis), place, axis)
            for old, x in zip(rows, fine, strict=True)
        )

    lost = jnp.zeros((), bool)
    for x in (*inputs, *deltas):
        lost |= ~jnp.isfinite(x).all()
    eta = jnp.where(lost, jnp.nan, eta)
    weights, momentum = pending.weights, pending.momentum
    if momentum is None:
        mixing = jnp.where(here, eta, alpha * weights.mixing)
        weights = Shares(alpha * weights.decay, None, mixing)
    else:
        assert weights.momentum_decay is not None
        assert momentum.momentum_decay is not None
        beta = jnp.exp(controls["log_beta"][0])
        mixing = jnp.where(here, eta, beta * momentum.mixing)
        left = beta * momentum.momentum_decay
        momentum = Shares(momentum.decay, left, mixing)
        weights = Shares(
            alpha * weights.decay,
            alpha * weights.momentum_decay + left,
            alpha * weights.mixing + mixing,
        )
    put_in = put(pending.inputs, inputs, 1), put(pending.deltas, deltas, 0)
    # Without a barrier XLA repeats the update for each use, each time into a copy.
    rows: Any = lax.optimization_barrier(put_in)
    pending = Pending(rows[0], rows[1], weights, momentum)
    return pending, _chunk(state, pending, weights)


def settled(memory: DeepMemory, state: DeepState, pending: Pending) -> DeepState:
    """The state after a full chunk."""
    weights = _chunk(state, pending, pending.weights).end(memory.ns_steps)
    if pending.momentum is None:
        return DeepState(weights)
    return DeepState(weights, _chunk(state, pending, pending.momentum).end())


def _chunk(state: DeepState, pending: Pending, shares: Shares) -> DeepChunk:
    """The chunk as its last token reads it."""
    of_momentum = shares.momentum_decay
    return DeepChunk(
        start=state,
        weight_decay=shares.decay[None],
        momentum_decay=None if of_momentum is None else of_momentum[None],
        mixing=shares.mixing[None],
        inputs=tuple(x.T for x in pending.inputs),
        deltas=pending.deltas,
    )
