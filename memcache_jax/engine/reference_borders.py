"""Borders of ``Adaptive`` by errors, token by token: the reference for ``measures``."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from memcache_jax._typing import Array, Bool, Int
from memcache_jax._varying import vary, varying
from memcache_jax.adaptive import Adaptive
from memcache_jax.engine.borders import Borders, borders_at, in_blocks
from memcache_jax.engine.types import Tokens
from memcache_jax.memories import Memory


def by_errors(
    segmentation: Adaptive,
    tokens: Tokens,
    weights: Mapping[str, Array],
    document: Int[Array, "b t"] | None,
    memory: Memory,
    carries: bool,
) -> Borders:
    """The borders of tokens (b, h, t, ...) by errors, also of packed documents."""
    batch, _, length = tokens.key.shape[:3]
    numbers = jnp.zeros((batch, length), int) if document is None else document
    ends = jax.vmap(
        lambda tokens, numbers: _ends(segmentation, tokens, weights, numbers, memory, carries)
    )(tokens, numbers)
    of_blocks = None
    if document is not None:
        of_blocks = in_blocks(document[:, None], segmentation, mode="edge")[:, 0]
    full = in_blocks(ends[:, None], segmentation)[:, 0, :, -1]
    return borders_at(segmentation, full, of_blocks)


def _ends(
    segmentation: Adaptive,
    tokens: Tokens,
    weights: Mapping[str, Array],
    document: Int[Array, "t"],
    memory: Memory,
    carries: bool,
) -> Bool[Array, "t"]:
    """Whether a segment of one row, (h, t, ...), ends with each token."""
    key, value, controls = tokens.key, tokens.value, tokens.controls
    heads, size, chunk = len(key), segmentation.size, memory.gradient_chunk
    sizes = key.shape[-1], value.shape[-1], key.dtype
    initial = jax.vmap(lambda weights: memory.init(weights, *sizes), axis_size=heads)(weights)
    initial = vary(initial, varying(key))

    def select(begins: Array, new: Any, old: Any) -> Any:
        return jax.tree.map(lambda new, old: jnp.where(begins, new, old), new, old)

    def error(state: Any, key: Array, value: Array) -> Array:
        missed = value - memory.read(memory.matrices(state), key[None])[0]
        square = jnp.vdot(value, value)
        return jnp.where(square == 0, 0, jnp.vdot(missed, missed) / square)

    def token(carry: tuple, t: Array) -> tuple[tuple, Array]:
        state, anchor, begun, ended, (before, segment, own, count) = carry
        begins = document[t] != document[jnp.maximum(t - 1, 0)]
        before, segment, own, count = (
            jnp.where(begins, 0, x) for x in (before, segment, own, count)
        )
        state = select(begins | (ended & (not carries)), initial, state)
        anew = begins | (t % size % (chunk or 1) == 0)
        anchor, begun = select(anew, (state, t), (anchor, begun))
        now = jax.tree.map(lambda x: x[:, t], (key, value, controls))
        own += jax.vmap(error)(anchor if chunk else state, *now[:2]).mean()
        count += 1
        state = jax.vmap(memory.step)(state, anchor, *now)
        last = t - jnp.arange(chunk or 1)
        coefficients = jax.tree.map(lambda x: x[:, jnp.maximum(last, 0)], controls)
        close = jax.vmap(memory.closed, in_axes=(0, 0, 0, None))
        closed = close(state, anchor, coefficients, last >= begun)
        state = select((t + 1) % size % (chunk or 1) == 0, closed, state)
        whole, mean = (t + 1) % size == 0, own / count
        ended = whole & segmentation.ends(before[None], segment[None], mean[None])[0]
        after = before + 1, segment + mean, jnp.zeros_like(own), jnp.zeros_like(count)
        sums = select(whole, after, (before, segment, own, count))
        sums = (jnp.where(ended, 0, sums[0]), jnp.where(ended, 0, sums[1]), *sums[2:])
        return (state, anchor, begun, ended, sums), ended

    zero = jnp.zeros_like(key[0, 0, 0])
    none = jnp.zeros_like(zero, dtype=int)
    first = initial, initial, none, none > 0, (none, zero, zero, none)
    return lax.scan(token, first, jnp.arange(key.shape[1]))[1]
