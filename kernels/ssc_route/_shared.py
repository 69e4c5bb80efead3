"""What the kernels of the routing share."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array
from memcache_jax.kernels._dispatch import routed
from memcache_jax.kernels._shapes import pad_to


def slots_are_states(reads: np.ndarray, num_states: int) -> bool:
    """Whether every state that is read is in the slot of its own number."""
    blocks, slots = reads.shape
    same = (reads < 0) | (reads == np.arange(slots))
    return slots == num_states and bool(same.all()) and blocks > 0


def select(logits: Array, reads: Array, online: Array, top_k: int, axis: int) -> tuple:
    """Selects the largest logits, and gates them and the online one; called in kernels.

    Args:
      logits: relevance, slots along ``axis`` and tokens along the other.
      reads: the states in the slots, -1 for none, float32 and shaped as the logits of one token.
      online: relevance of the online state, shaped as the logits of one slot.
      top_k: how many to select.
      axis: the axis of the slots.

    Returns:
      The gates, the online gate, and the selected states. Gates and states are lists of arrays
      shaped as ``online``.
    """
    slots = jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis).astype(jnp.float32)
    left = jnp.where(reads >= 0, logits, -jnp.inf)
    largest, states = [], []
    for _ in range(top_k):
        largest.append(left.max(axis=axis, keepdims=True))
        first = jnp.where(left == largest[-1], slots, jnp.inf).min(axis=axis, keepdims=True)
        hit = slots == first
        state = jnp.where(hit, reads, 0.0).sum(axis=axis, keepdims=True)
        states.append(jnp.where(largest[-1] > -jnp.inf, state, -1.0))
        left = jnp.where(hit, -jnp.inf, left)
    most = jnp.maximum(largest[0], online)
    weights = [jnp.exp(x - most) for x in (*largest, online)]
    total = sum(weights[1:], weights[0])
    *gates, online_gate = (weight / total for weight in weights)
    return gates, online_gate, states


def scattered(d_logits: Sequence[Array], states: Sequence[Array], reads: Array) -> Array:
    """The gradient of all logits from that of the selected ones; called in kernels."""
    parts = [jnp.where(reads == s, d, 0.0) for d, s in zip(d_logits, states, strict=True)]
    return sum(parts[1:], parts[0])


def by_kernels(
    kernels: Any,
    connector: Array,
    pooled: Array,
    online: Array,
    reads: np.ndarray,
    top_k: int,
    rows: int,
    slots: int,
    features: int,
) -> tuple[Array, Array, Array]:
    """The routing of arguments as in ``api.ssc_route``, through the kernels of a platform.

    Args:
      kernels: ``forward(connector, keys, online, reads)`` to gates (units, n, s, rows), online gate
        and states, and ``backward(connector, keys, reads, states, d_logits)`` to the gradients of
        connector and keys (units, tables, slots, features), in float32.
      connector: as in ``api.ssc_route``, as are the next four.
      pooled: see connector.
      online: see connector.
      reads: see connector.
      top_k: see connector.
      rows: rows of a block, padded.
      slots: slots, padded.
      features: features, padded.
    """
    batch, heads, blocks, c, _ = connector.shape
    units = batch * heads
    wide = np.full((blocks, 1, slots), -1, np.float32)
    wide[:, 0, : reads.shape[1]] = reads
    keys = pooled[:, :, None]  # one table for all blocks, or one for each
    if not slots_are_states(reads, pooled.shape[2]):
        keys = pooled[:, :, np.maximum(reads, 0)]
    run = _differentiable(kernels)
    gates, online_gate, states = run(
        jnp.asarray(wide),
        pad_to(connector.reshape(units, blocks, c, -1), (rows, features)).astype(jnp.float32),
        pad_to(keys.reshape(units, *keys.shape[2:]), (slots, features)).astype(jnp.float32),
        pad_to(online.reshape(units, blocks, c), (rows,)).astype(jnp.float32),
    )

    def by_token(x: Array) -> Array:
        return jnp.swapaxes(x, 2, 3).reshape(batch, heads, blocks, rows, top_k)[:, :, :, :c]

    online_gate = online_gate.reshape(batch, heads, blocks, rows)[..., :c]
    dtype = jnp.result_type(connector, pooled, online)
    gates = by_token(gates).astype(dtype)
    return gates, online_gate.astype(dtype), by_token(states).astype(jnp.int32)


def _differentiable(kernels: Any) -> Callable[..., tuple[Array, Array, Array]]:
    @jax.custom_vjp
    def route(reads, connector, keys, online):
        return kernels.forward(connector, keys, online, reads)

    def forward(reads, connector, keys, online):
        gates, online_gate, states = routed(route(reads, connector, keys, online))
        return (gates, online_gate, states), (reads, connector, keys, gates, online_gate, states)

    def backward(residuals, cotangents):
        reads, connector, keys, gates, online_gate, states = residuals
        d_gates, d_online_gate, _ = cotangents
        mean = (gates * d_gates).sum(axis=2) + online_gate * d_online_gate
        d_logits = gates * (d_gates - mean[:, :, None])
        d_connector, d_keys = kernels.backward(connector, keys, reads, states, d_logits)
        return None, d_connector, d_keys, online_gate * (d_online_gate - mean)

    route.defvjp(forward, backward)
    return route
