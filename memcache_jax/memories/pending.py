"""The tokens of a deep memory's chunk that are not yet written into its state.

All gradients of a chunk are taken at the state that it began with, so a token adds a rank-one
matrix to each layer. A stream that takes tokens one by one keeps these factors, reads through them,
and writes the state once, at the chunk's end: a token then writes two vectors per layer instead of
the weights and the momentum.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memcache_jax._typing import Array, Controls, Float, Int, Matrices
from memcache_jax.memories.deep import DeepMemory
from memcache_jax.memories.deep_chunk import DeepChunk, DeepState


class Shares(NamedTuple):
    """The shares of the state (W, S) and of each token in the current weights, or momentum.

    They are ``decay W + momentum_decay S - sum_j mixing[j] deltas[j] inputs[j]^T``. Shares after
    each of several tokens have a leading axis of tokens.
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


def with_tokens(
    memory: DeepMemory,
    state: DeepState,
    pending: Pending,
    place: Int[Array, ""],
    count: Int[Array, ""],
    key: Float[Array, "n k"],
    value: Float[Array, "n v"],
    controls: Controls,
) -> tuple[Pending, DeepChunk, tuple[Shares, Shares | None]]:
    """Adds tokens to the chunk, from ``place`` on.

    Arguments are as for ``Memory.write``; the state is the one with which the chunk began.

    Returns:
      The chunk with the first ``count`` tokens (a single token is always added); the view that
      reads the memory after each token; and the shares (n, ...) in weights and momentum after
      each.
    """
    inputs, deltas = memory.inner_gradient(state.weights, key, value)
    eta = memory.rates(controls, inputs, deltas)

    # Factors left over from earlier chunks have zero mixing.
    fine = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), (inputs, deltas))
    put_in = (
        tuple(
            _put(x, new.T, place, count, 1) for x, new in zip(pending.inputs, fine[0], strict=True)
        ),
        tuple(
            _put(x, new, place, count, 0) for x, new in zip(pending.deltas, fine[1], strict=True)
        ),
    )
    lost = jnp.zeros(len(key), bool)
    for x in (*inputs, *deltas):
        lost |= ~jnp.isfinite(x).all(axis=1)
    controls = {**controls, "eta": jnp.where(lost, jnp.nan, eta)}
    after = _after_one if len(key) == 1 else _after_each
    each: Any = after(memory, pending, place, controls)
    # Without a barrier XLA repeats the update for each use, each time into a copy.
    rows: Any = lax.optimization_barrier(put_in)
    shares: Any
    if len(key) == 1:
        shares = jax.tree.map(lambda x: x[0], each)
    else:
        before = pending.weights, pending.momentum
        at = jnp.maximum(count - 1, 0)
        shares = jax.tree.map(lambda x, old: jnp.where(count > 0, x[at], old), each, before)
    chunk = _chunk(state, Pending(*rows, *each), each[0])
    return Pending(*rows, *shares), chunk, each


def _put(
    old: Float[Array, "..."], new: Float[Array, "..."], place: Array, count: Array, axis: int
) -> Array:
    """``old`` with the first ``count`` rows of ``new``, or its only one, put at ``place``."""
    size, added = old.shape[axis], new.shape[axis]
    if added == 1:
        return lax.dynamic_update_slice_in_dim(old, new, place, axis)
    moved = _moved(new, place, size, axis)
    ahead = jnp.arange(size) - place
    here = jnp.expand_dims((ahead >= 0) & (ahead < count), 1 - axis)
    return jnp.where(here, moved, old)


def _moved(x: Array, place: Array, size: int, axis: int) -> Array:
    """``size`` rows along an axis: those of x from ``place`` on, zeros elsewhere."""
    widths = [(size, size) if i == axis else (0, 0) for i in range(x.ndim)]
    return lax.dynamic_slice_in_dim(jnp.pad(x, widths), size - place, size, axis)


def _after_one(
    memory: DeepMemory, pending: Pending, place: Array, controls: Controls
) -> tuple[Shares, Shares | None]:
    """The shares (1, ...) in weights and momentum after one more token."""
    here = jnp.arange(memory.chunk_size) == place
    weights: Any = pending.weights
    momentum: Any = pending.momentum
    alpha, eta = jnp.exp(controls["log_alpha"]), controls["eta"]
    if momentum is None:
        mixing = jnp.where(here, eta, alpha * weights.mixing)[None]
        return Shares(alpha * weights.decay, None, mixing), None
    beta = jnp.exp(controls["log_beta"])
    mixing = jnp.where(here, eta, beta * momentum.mixing)
    left = beta * momentum.momentum_decay
    after = Shares(
        alpha * weights.decay,
        alpha * weights.momentum_decay + left,
        (alpha * weights.mixing + mixing)[None],
    )
    return after, Shares(momentum.decay[None], left, mixing[None])


def _after_each(
    memory: DeepMemory, pending: Pending, place: Array, controls: Controls
) -> tuple[Shares, Shares | None]:
    """The shares (n, ...) in weights and momentum after each of several more tokens."""
    weights: Any = pending.weights
    momentum: Any = pending.momentum
    size = memory.chunk_size
    lost = jnp.isnan(controls["eta"])
    controls = {**controls, "eta": jnp.where(lost, 0, controls["eta"])}
    parts: Any = memory.coefficients(controls, None)
    of_weights, *of_momentum = parts
    alpha = of_weights.weight_decay

    def added(mixing: Float[Array, "n n"]) -> Float[Array, "n m"]:
        gone = jnp.cumsum(lost) > 0
        return jnp.where(gone[:, None], jnp.nan, _moved(mixing, place, size, 1))

    mixing = alpha[:, None] * weights.mixing[None] + added(of_weights.mixing)
    if momentum is None:
        return Shares(alpha * weights.decay, None, mixing), None
    beta, kept = of_momentum[0].momentum_decay, of_weights.momentum_decay
    after = Shares(
        alpha * weights.decay,
        alpha * weights.momentum_decay + kept * momentum.momentum_decay,
        mixing + kept[:, None] * momentum.mixing[None],
    )
    own = beta[:, None] * momentum.mixing[None] + added(of_momentum[0].mixing)
    decay = jnp.broadcast_to(momentum.decay, beta.shape)
    return after, Shares(decay, beta * momentum.momentum_decay, own)


def settled(memory: DeepMemory, state: DeepState, pending: Pending) -> DeepState:
    """The state after a full chunk."""
    weights, momentum = jax.tree.map(lambda x: x[None], (pending.weights, pending.momentum))
    ended = _chunk(state, pending, weights).end(memory.ns_steps)
    return DeepState(ended, () if momentum is None else _chunk(state, pending, momentum).end())


def _chunk(state: DeepState, pending: Pending, shares: Shares) -> DeepChunk:
    """The chunk as tokens with these shares, (n, ...), read it."""
    return DeepChunk(
        start=state,
        weight_decay=shares.decay,
        momentum_decay=shares.momentum_decay,
        mixing=shares.mixing,
        inputs=tuple(x.T for x in pending.inputs),
        deltas=pending.deltas,
    )
